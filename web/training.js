// Ties the training view to ComfyUI: one DOM widget per DyDiTTrain node, fed by the server's events while it trains, and
// with the last of them whenever a node is made anew (reload, undo, tab switch).

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { CANVAS_MARGIN, forwardToCanvas } from './canvas.js'
import { executionIds, findNode } from './records.js'
import { speak } from './strings.js'
import { TrainingView } from './view/training.js'

const NODE_CLASS = 'DyDiTTrain'
const MIN_WIDTH = 340

const views = new WeakMap() // node → TrainingView
const events = new Map() // workflow and node → its last event

const rootGraph = () => app.rootGraph ?? app.graph
const workflowId = () => rootGraph()?.id ?? ''
const keyOf = (workflow, node) => `${workflow}:${node}`

function onTraining({ detail }) {
  events.set(keyOf(detail.workflow, detail.node), detail)
  if (detail.workflow !== workflowId()) return
  const node = findNode(rootGraph(), detail.node)
  if (node) views.get(node)?.show(detail)
}

/** Show what a node said last, from this page's memory or else the server's. */
async function refill(node) {
  const workflow = workflowId()
  for (const id of executionIds(rootGraph(), node)) {
    const query = new URLSearchParams({ node: id, workflow })
    const event = events.get(keyOf(workflow, id)) ?? (await (await api.fetchApi(`/dydit/training?${query}`)).json())
    if (event.state) return views.get(node)?.show(event)
  }
}

function addView(node) {
  const language = speak(app.extensionManager.setting.get('Comfy.Locale'))
  const view = new TrainingView(document)
  view.root.lang = language
  const widget = node.addDOMWidget('training', 'DYDIT_TRAINING', view.root, {
    serialize: false, // not sent with the prompt
    hideOnZoom: false,
    hideInPanel: true, // the side panel would take the only element away from the node
    getMinHeight: () => view.minHeight + 2 * CANVAS_MARGIN,
    getValue: () => '',
    setValue: () => {}
  })
  widget.serialize = false // not stored in the workflow
  forwardToCanvas(app, view.root)
  views.set(node, view)
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width, MIN_WIDTH), Math.max(node.size[1], height)])
}

app.registerExtension({
  name: 'dydit.Training',
  setup() {
    document.head.append(Object.assign(document.createElement('link'), {
      rel: 'stylesheet', href: new URL('./training.css', import.meta.url).href
    }))
    api.addEventListener('dydit.training', onTraining)
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE_CLASS) addView(node)
  },
  loadedGraphNode(node) {
    if (views.has(node)) refill(node).catch((error) => console.warn('[DyDiT] the training could not be asked for:', error))
  }
})

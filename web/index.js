// Ties the token map to ComfyUI: one DOM widget per DyDiTBudget node, fed by the server's events while it samples
// and from its trace route whenever a node is made anew (reload, undo, tab switch, a cached re-run).

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { pageMemory, sharePng } from './browser.js'
import { CANVAS_MARGIN, forwardToCanvas } from './canvas.js'
import { Maps } from './maps.js'
import { finalPictures } from './pictures.js'
import { executionIds, findNode, Records } from './records.js'
import { speak } from './strings.js'
import { MapView } from './view.js'

const NODE_CLASS = 'DyDiTBudget'
const MIN_WIDTH = 330
const NEW_NODE_ROOM = 60 // above the least height: a new node shows a square map at full width

const records = new Records()
const maps = new Maps(askMap)
const memory = pageMemory(() => window.localStorage)
const views = new WeakMap() // node → MapView
let prompt = '' // the id of the prompt that is running

const rootGraph = () => app.rootGraph ?? app.graph
const workflowId = () => rootGraph()?.id ?? ''

/** The record an event speaks of. A prompt that came without a workflow is not the one on screen, whatever its node ids. */
const recordOf = (event) => records.of(event.workflow, event.node)

/** Every DyDiTBudget node of a graph, in its subgraphs too. */
function ourNodes(graph) {
  return graph.nodes.flatMap((node) => (node.subgraph ? ourNodes(node.subgraph) : views.has(node) ? [node] : []))
}

/** Draw a record on its node, if that node is in the workflow on screen. */
function show(record) {
  if (record.workflow !== workflowId()) return
  const node = findNode(rootGraph(), record.node)
  if (node) views.get(node)?.show(record)
}

async function fetchJson(path) {
  const response = await api.fetchApi(path)
  const body = await response.json()
  if (!response.ok) throw new Error(body.error)
  return body
}

async function askMap(path) {
  const response = await api.fetchApi(path)
  return { status: response.status, retryAfter: Number(response.headers.get('Retry-After')) || 1, body: await response.json() }
}

/** Fill a record's gaps from the server's store, or say in words that it has let go of the run. */
async function fetchSummary(record) {
  const { run } = record
  try {
    record.addSummary(await fetchJson(`/dydit/trace/${encodeURIComponent(run.id)}`))
  } catch (error) {
    run.notice = error.message
  }
  show(record)
  if (!run.pictures.length) await fetchPictures(record, run)
}

/** What the run's prompt made in the end, from the server's history; there it is when nothing of it executes any more. */
async function fetchPictures(record, run) {
  if (!run.prompt) return
  const { [run.prompt]: entry } = await fetchJson(`/history/${run.prompt}`).catch(() => ({})) // without it the map stands alone
  const queries = entry ? finalPictures(entry, record.node) : []
  if (queries.length) run.pictures = queries.map((query) => api.apiURL(`/view?${query}`))
  show(record)
}

/** Ask the server for the latest run of a node that this page knows nothing of. */
async function fetchLatestRun(record) {
  const query = new URLSearchParams({ node: record.node, workflow: record.workflow })
  const { runs } = await fetchJson(`/dydit/runs?${query}`)
  if (!runs.length || record.run.status.state) return // never run, or a run began meanwhile
  record.addStatus(runs[0])
  show(record)
  await fetchSummary(record)
}

/** Show what is known of a node, from this page's memory or else the server's. */
function refill(node) {
  const candidates = executionIds(rootGraph(), node).map((id) => records.of(workflowId(), id))
  const known = candidates.find((record) => record.run.status.state)
  if (known) return show(known)
  for (const record of candidates)
    fetchLatestRun(record).catch((error) => console.warn('[DyDiT] the latest run could not be asked for:', error))
}

function onStep({ detail }) {
  const record = recordOf(detail)
  record.addStep(detail)
  record.run.prompt = prompt
  show(record)
}

function onStatus({ detail }) {
  const record = recordOf(detail)
  record.addStatus(detail)
  record.run.prompt = prompt
  show(record)
  if (record.run.ended) fetchSummary(record) // live, the server drops steps that come too fast
}

/** A cached re-run samples nothing and sends no step: what this page does not know, the server may. */
function onSuccess() {
  for (const node of ourNodes(rootGraph())) refill(node)
}

/** A preview belongs to the run that is sampling: the server runs one node at a time. */
function onPreview({ detail }) {
  for (const record of records.ofPrompt(prompt)) {
    if (record.run.ended) continue
    record.run.pictures = [detail]
    show(record)
  }
}

/** Nothing is executing any more: what previewed gives way to what was made. */
function onExecuting({ detail }) {
  for (const record of detail ? [] : records.ofPrompt(prompt)) fetchPictures(record, record.run)
}

/** Give a node of the classic canvas the height its widgets need by now. Nodes 2.0 sees to that itself. */
function grow(node) {
  const least = node.computeSize()[1]
  if (window.LiteGraph?.vueNodesMode || node.size[1] >= least) return
  node.setSize([node.size[0], least])
  app.canvas.setDirty(true, true)
}

function addView(node) {
  const language = speak(app.extensionManager.setting.get('Comfy.Locale')) // where that changes, ComfyUI makes the nodes anew
  const slider = node.widgets?.find(({ name }) => name === 'budget')
  const view = new MapView(document, {
    maps, memory,
    budget: () => Number(slider?.value),
    onFrame: (draw) => requestAnimationFrame(draw),
    resized: () => views.has(node) && grow(node),
    share: (canvas, file) => sharePng(window, canvas, file)
  })
  view.root.lang = language // Chinese and Japanese draw some characters each in their way
  const widget = node.addDOMWidget('token_map', 'DYDIT_TOKEN_MAP', view.root, {
    serialize: false, // not sent with the prompt
    hideOnZoom: false,
    hideInPanel: true, // the side panel would take the only element away from the node
    getMinHeight: () => view.minHeight + 2 * CANVAS_MARGIN,
    getValue: () => '',
    setValue: () => {}
  })
  const { callback } = slider ?? {}
  if (slider) slider.callback = function (...values) {
    view.refresh()
    return callback?.apply(this, values)
  }
  widget.serialize = false // not stored in the workflow
  forwardToCanvas(app, view.root)
  views.set(node, view)
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width, MIN_WIDTH), Math.max(node.size[1], height + NEW_NODE_ROOM)])
}

function addStyle() {
  const link = Object.assign(document.createElement('link'), {
    rel: 'stylesheet', href: new URL('./view.css', import.meta.url).href
  })
  document.head.append(link)
}

app.registerExtension({
  name: 'dydit.TokenMap',
  setup() {
    addStyle()
    api.addEventListener('dydit.step', onStep)
    api.addEventListener('dydit.status', onStatus)
    api.addEventListener('execution_start', ({ detail }) => { prompt = detail.prompt_id })
    api.addEventListener('execution_success', onSuccess)
    api.addEventListener('executing', onExecuting)
    api.addEventListener('b_preview', onPreview)
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE_CLASS) addView(node)
  },
  loadedGraphNode(node) {
    if (views.has(node)) refill(node)
  }
})

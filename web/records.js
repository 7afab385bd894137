// Which node an event belongs to, and which runs of that node are shown. No DOM, no ComfyUI.

import { Run } from './run.js'
import { DEFAULT } from './selection.js'

// A record outlives the node's widget (undo and a tab switch make new nodes), so their number must be bounded:
// 16 × 64×64 cells × 50 steps is some 4 MB.
const MAX_RECORDS = 16

/** One node: its latest run, the run that was pinned beside it, and what one looks at. */
export class NodeRecord {
  constructor(workflow, node) {
    Object.assign(this, { workflow, node, run: new Run(), pinned: null, compare: 'both', selection: DEFAULT })
  }

  #follow(id, status) {
    if (id === this.run.id && this.run.status.state) return
    this.run = new Run(id, status)
    this.selection = { ...this.selection, step: null }
  }

  /** Take in a `dydit.step`. A run we were not told about starts afresh: its start was sent before we listened. */
  addStep(event) {
    this.#follow(event.run)
    this.run.addStep(event)
  }

  /** Take in a `dydit.status`. The map goes with the run it belongs to: it must not stand above another's words. */
  addStatus(event) {
    this.#follow(event.run, event)
    this.run.status = event
  }

  /** Take in the summary of a run, unless a newer one began while it was being fetched. */
  addSummary(summary) {
    if (summary.run === this.run.id) this.run.addSummary(summary)
  }

  /** Whether there are two runs to look at. */
  get compares() {
    return this.pinned !== null && this.pinned !== this.run
  }
}

/** The records of the last few nodes, by workflow and node id. */
export class Records {
  #byKey = new Map()

  /** The record of a node, made when there is none. */
  of(workflow, node) {
    const key = `${workflow}/${node}`
    const record = this.#byKey.get(key) ?? new NodeRecord(workflow, node)
    this.#byKey.delete(key)
    this.#byKey.set(key, record) // most recently used last
    if (this.#byKey.size > MAX_RECORDS) this.#byKey.delete(this.#byKey.keys().next().value)
    return record
  }

  /** The records whose latest run is part of a prompt. */
  ofPrompt(prompt) {
    return [...this.#byKey.values()].filter(({ run }) => prompt && run.prompt === prompt)
  }
}

/** The node with an execution id such as "7", or "12:5" inside the subgraph node 12. */
export function findNode(rootGraph, executionId) {
  let graph = rootGraph
  let node = null
  for (const id of String(executionId).split(':')) {
    node = graph?.getNodeById(id) ?? null
    graph = node?.subgraph
  }
  return node
}

/** Every execution id of a node: more than one when its subgraph is used several times. */
export function executionIds(graph, node, prefix = '') {
  return graph.nodes.flatMap((other) => {
    if (other === node) return [`${prefix}${other.id}`]
    return other.subgraph ? executionIds(other.subgraph, node, `${prefix}${other.id}:`) : []
  })
}

// Which node an event belongs to, and what is known of that node's latest run. No DOM, no ComfyUI.

// A record outlives the node's widget (undo and a tab switch make new nodes), so their number must be bounded:
// 16 × 64×64 cells × 50 steps is some 4 MB.
const MAX_RECORDS = 16

/** What is known of one node's latest run. `frames` is indexed by step and has holes where steps were not sent. */
export class RunRecord {
  constructor(workflow, node) {
    Object.assign(this, { workflow, node, run: '', status: null, frames: [], total: 0, notice: '' })
  }

  #begin(run, status) {
    Object.assign(this, { run, status, frames: [], total: 0, notice: '' })
  }

  /** Take in a `dydit.step`. A run we were not told about starts afresh: its start was sent before we listened. */
  addStep(event) {
    if (event.run !== this.run) this.#begin(event.run, { state: 'running', lines: [] })
    this.frames[event.step] = event
    this.notice = ''
    this.total = Math.max(event.total, event.step + 1)
  }

  /** Take in a `dydit.status`. The map goes with the run it belongs to: it must not stand above another's words. */
  addStatus(event) {
    if (event.run !== this.run) this.#begin(event.run, event)
    this.status = event
  }

  /** Take in a whole trace, unless a newer run began while it was being fetched. */
  addTrace(trace) {
    if (this.run && trace.run !== this.run) return
    const expected = this.total
    this.addStatus(trace)
    trace.frames.forEach((frame) => this.addStep(frame))
    // A finished run has as many steps as it took; one that was cut short keeps those it was meant to take.
    this.total = trace.state === 'done' ? this.frames.length : Math.max(expected, this.total)
  }

  get ended() {
    return ['done', 'interrupted', 'failed'].includes(this.status?.state)
  }

  get count() {
    return this.frames.reduce((count) => count + 1, 0) // holes are not visited
  }

  get latest() {
    return this.frames.length - 1
  }

  /** Whether steps are missing that the server may still have. */
  get hasGaps() {
    return this.count < this.total || this.count === 0
  }

  /** The frame of a step; where it is missing, the nearest earlier one, else the first there is. */
  frameAt(step) {
    for (let i = Math.min(step, this.latest); i >= 0; i--) if (this.frames[i]) return this.frames[i]
    return this.frames.find(Boolean) ?? null
  }
}

/** The records of the last few nodes, by workflow and node id. */
export class Records {
  #byKey = new Map()

  /** The record of a node, made when there is none. */
  of(workflow, node) {
    const key = `${workflow}/${node}`
    const record = this.#byKey.get(key) ?? new RunRecord(workflow, node)
    this.#byKey.delete(key)
    this.#byKey.set(key, record) // most recently used last
    if (this.#byKey.size > MAX_RECORDS) this.#byKey.delete(this.#byKey.keys().next().value)
    return record
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

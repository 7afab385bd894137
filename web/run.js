// What this page knows of one sampling run: its facts, its steps, and how much of each block was computed.
// No DOM, no ComfyUI. Bytes are 255 for 100 %.

import { decodeBytes, decodeGrid } from './heatmap.js'
import { MEAN } from './selection.js'

const ENDED = ['done', 'interrupted', 'failed']

const mean = (values) => {
  const known = values.filter(Number.isFinite) // holes and steps without this branch do not count
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null
}

/** The rows of a table of steps × blocks that came as one string of bytes. */
function tableRows(base64, steps, blocks) {
  const bytes = base64 && decodeBytes(base64)
  return bytes?.length === steps * blocks ? Array.from({ length: steps }, (_, i) => bytes.subarray(i * blocks, (i + 1) * blocks)) : []
}

/** All lists by step have holes where a step is not known. */
export class Run {
  constructor(id = '', status = { state: id ? 'running' : '', lines: [] }) {
    Object.assign(this, {
      id, status, steps: [], total: 0, blocks: [], branches: [], frames: 1, rows: 0, cols: 0, token_rows: 0, token_cols: 0,
      kept: {}, heads: [], groups: [], live: [], notice: '', prompt: '', pictures: [], revision: 0
    })
  }

  #describe({ rows, cols, token_rows, token_cols, frames, blocks, branches }) {
    const known = [...new Set([...this.branches, ...branches])].sort() // "cond" comes before "uncond"
    Object.assign(this, { rows, cols, token_rows, token_cols, frames, blocks, branches: known })
    this.revision++
  }

  /** Take in a `dydit.step`. */
  addStep(event) {
    const { step, sigma, flops, computed } = event
    this.#describe(event)
    this.steps[step] = { step, sigma, flops, computed, seconds: null }
    for (const branch of event.branches) (this.kept[branch] ??= [])[step] = decodeBytes(event.kept[branch])
    for (const width of ['heads', 'groups']) if (event[width]) this[width][step] = decodeBytes(event[width])
    const bytes = decodeGrid(event)
    const each = event.each ? decodeBytes(event.each) : null
    if (bytes) this.live[step] = { mean: this.#liveMap(bytes), frames: each ? this.#frames(each) : [] }
    this.notice = ''
    this.total = Math.max(event.total, step + 1)
  }

  /** Take in the summary of this run; it knows every step that was recorded. */
  addSummary(summary) {
    const { state, lines, asked, ignored, achieved, floor, seconds_per_step, steps, kept, branches, blocks } = summary
    this.status = { state, lines, asked, ignored, achieved, floor, seconds_per_step }
    this.prompt = summary.prompt || this.prompt
    if (!steps.length) return
    this.#describe(summary)
    for (const fact of steps) this.steps[fact.step] = fact
    const spread = (list, base64, ran = () => true) =>
      tableRows(base64, steps.length, blocks.length).forEach((row, i) => { if (ran(steps[i])) list[steps[i].step] = row })
    for (const branch of branches) spread((this.kept[branch] ??= []), kept[branch], (fact) => fact.branches.includes(branch))
    for (const width of ['heads', 'groups']) spread(this[width], summary[width])
    // A finished run has as many steps as it took; one that was cut short keeps those it was meant to take.
    this.total = state === 'done' ? this.steps.length : Math.max(this.total, this.steps.length)
  }

  #liveMap(bytes) {
    const { rows, cols, token_rows, token_cols } = this
    return { rows, cols, token_rows, token_cols, bytes, heads: null, groups: null }
  }

  #frames(bytes) {
    const size = this.rows * this.cols
    return Array.from({ length: this.frames }, (_, frame) => this.#liveMap(bytes.subarray(frame * size, (frame + 1) * size)))
  }

  get ended() {
    return ENDED.includes(this.status.state)
  }

  get count() {
    return this.steps.reduce((count) => count + 1, 0) // holes are not visited
  }

  get latest() {
    return this.steps.length - 1
  }

  get hasWidths() {
    return this.heads.length + this.groups.length > 0
  }

  /** A step that is known: where `step` is missing, the nearest earlier one, else the first there is. */
  nearestStep(step) {
    for (let i = Math.min(step, this.latest); i >= 0; i--) if (this.steps[i]) return i
    return this.steps.findIndex(Boolean)
  }

  /** A map that came with a live step: the mean over blocks and branches, of all frames or of one. */
  liveMap({ step, block, branch, frame }) {
    const maps = block === MEAN && branch === null ? this.live[step] : null
    return (frame === null ? maps?.mean : maps?.frames[frame]) ?? null
  }

  /**
   * The picture of a frame, for the mean of all the first: an address, or a Blob while it is a preview, which shows the first
   * frame. Of the pictures of a list of runs the last are this one's; null where they are not those of whole videos.
   */
  pictureOf(frame) {
    const { pictures, frames } = this
    if (pictures.length % frames === 0) return pictures.at((frame ?? 0) - frames) ?? null
    return pictures.length === 1 && !frame ? pictures[0] : null
  }

  /** Share of the tokens computed at a step and block (each may be a mean) of one branch, or of all; null if unknown. */
  keptAt(step, block, branch) {
    if (block === MEAN && branch === null) return this.#overSteps(step, (i) => this.steps[i]?.computed)
    const branches = branch === null ? this.branches : [branch]
    return this.#overSteps(step, (i) => mean(branches.map((name) => atBlock(this.kept[name]?.[i], block))))
  }

  /** Share of the heads or of the channel groups ("heads", "groups") computed; null if unknown. */
  widthAt(width, step, block) {
    return this.#overSteps(step, (i) => atBlock(this[width][i], block))
  }

  flopsAt(step) {
    return step === MEAN && Number.isFinite(this.status.achieved)
      ? this.status.achieved : this.#overSteps(step, (i) => this.steps[i]?.flops)
  }

  secondsAt(step) {
    return this.#overSteps(step, (i) => this.steps[i]?.seconds)
  }

  #overSteps(step, value) {
    return mean(step === MEAN ? Array.from(this.steps, (_, i) => value(i)) : [value(step)])
  }
}

function atBlock(row, block) {
  if (!row) return null
  return block === MEAN ? mean(Array.from(row)) / 255 : row[block] / 255
}

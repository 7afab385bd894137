// Runs as the server tells of them, version 2 of its events and routes.

export const base64 = (bytes) => Buffer.from(bytes).toString('base64')
export const plain = (text) => text.replaceAll('\u00a0', ' ')

const BLOCKS = ['double 0', 'double 1', 'single 0']
const both = (value) => ({ cond: value, uncond: value })

/** A `dydit.step`. `kept` are bytes by branch. */
export function step(step, { run = 'a', bytes = [0, 255, 51, 102], rows = 2, cols = 2, total = 4, frames = 1, blocks = BLOCKS,
  kept = both([255, 102, 51]), heads = null, groups = null, ...rest } = {}) {
  return {
    v: 2, node: '7', workflow: 'w', run, step, total, sigma: 1 - step / total, computed: 0.4, flops: 0.5, rows, cols,
    token_rows: rows, token_cols: cols, grid: base64(bytes), frames, blocks, branches: Object.keys(kept),
    kept: Object.fromEntries(Object.entries(kept).map(([name, row]) => [name, base64(row)])),
    heads: heads && base64(heads), groups: groups && base64(groups), ...rest
  }
}

export function status(run, state, more = {}) {
  return { v: 2, node: '7', workflow: 'w', run, state, lines: [state], asked: 0.6, achieved: null, seconds_per_step: null, ...more }
}

/** A summary; `steps` are the numbers of the recorded steps, `kept` one row of bytes for all of them, by branch. */
export function summary(run, state, steps, { blocks = BLOCKS, kept = both([255, 102, 51]), heads = null, groups = null, ...more } = {}) {
  const table = (row) => row && base64(steps.flatMap(() => row))
  return {
    ...status(run, state, { achieved: 0.55 }), rows: 2, cols: 2, token_rows: 2, token_cols: 2, frames: 1, blocks,
    branches: Object.keys(kept), kept: Object.fromEntries(Object.entries(kept).map(([name, row]) => [name, table(row)])),
    heads: table(heads), groups: table(groups),
    steps: steps.map((step) => ({ step, sigma: 0.5, flops: 0.5, computed: 0.4, seconds: 0.25, branches: Object.keys(kept) })), ...more
  }
}

/** One map of the route, with its status and body. */
export function mapAnswer({ bytes = [255, 255, 0, 0], heads = null, groups = null } = {}) {
  return { status: 200, body: { v: 2, rows: 2, cols: 2, token_rows: 2, token_cols: 2, grid: base64(bytes), computed: 0.5, heads, groups } }
}

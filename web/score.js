// The steps × blocks of a run as pixels and paths. No DOM, no ComfyUI.

import { paint } from './heatmap.js'
import { MEAN } from './selection.js'

const range = (count) => Array.from({ length: count }, (_, i) => i)
const CLEAR = [0, 0, 0, 0]

/** Pixels of the shares kept at these steps (across) and blocks (down); clear where nothing is known. */
function cells(run, branch, steps, blocks) {
  const pixels = blocks.flatMap((block) => steps.flatMap((step) => {
    const share = run.keptAt(step, block, branch)
    return share === null ? CLEAR : [...paint([Math.round(255 * share)])]
  }))
  return { width: steps.length, height: blocks.length, pixels }
}

/** The four parts of the matrix: every step and block, and their means at its upper and left edge. */
export function paintScore(run, branch) {
  const steps = range(run.total)
  const blocks = range(run.blocks.length)
  return {
    corner: cells(run, branch, [MEAN], [MEAN]), all: cells(run, branch, steps, [MEAN]),
    mean: cells(run, branch, [MEAN], blocks), body: cells(run, branch, steps, blocks)
  }
}

const gapOf = (total) => (total > 64 ? 0 : 0.08) // thin bars need every pixel
const topOf = (flops) => Number((1 - Math.min(Math.max(flops, 0.02), 1)).toFixed(4)) // a free step shows that it took place

/** Shares as bars, an SVG path in a box `total` wide and 1 high: bar i stands on [i, i+1]. Unknown ones stay empty. */
export function barsPath(shares, total) {
  const gap = gapOf(total)
  return shares.map((share, i) => (share === null ? '' : `M${i + gap} 1V${topOf(share)}H${i + 1 - gap}V1z`)).join('')
}

const RULES = [0.02, 0.2, 0.4, 0.6, 0.8]

/** What the bars leave free, ruled with a line at every fifth: what was skipped or reused. */
export function rulesPath(shares, total) {
  const gap = gapOf(total)
  return shares.map((share, i) => (share === null ? '' : RULES.filter((y) => y < topOf(share) - 0.03)
    .map((y) => `M${i + gap} ${y}H${i + 1 - gap}`).join(''))).join('')
}

/** The tops of another run's bars as steps of a line, stretched to the same box. */
export function outlinePath(shares, total) {
  const width = total / shares.length
  return shares.map((share, i) => (share === null ? '' : `M${i * width} ${topOf(share)}H${(i + 1) * width}`)).join('')
}

/** Heads or groups as ticks, a path in a box `flags.length` wide and 1 high: tall where computed, short where not. */
export function ticksPath(flags) {
  return [...flags].map((flag, i) => `M${i + 0.15} 1V${flag === '1' ? 0 : 0.7}H${i + 0.85}V1z`).join('')
}

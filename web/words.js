// The sentences of the token map, made of strings.js and numbers. No DOM, no ComfyUI.

import { tokensOf } from './heatmap.js'
import { MEAN } from './selection.js'
import { t } from './strings.js'

/** "62 %". Only exactly nothing reads 0 % and only exactly everything reads 100 %. */
export function percent(share) {
  const rounded = Math.round(100 * share)
  return t('percent', { n: share > 0 && share < 1 ? Math.min(Math.max(rounded, 1), 99) : rounded })
}

/** Parts of a line, those that are empty left out. */
export const line = (parts) => parts.filter(Boolean).join(t('list'))

/** "step 12 of 20", or "mean of 20 steps". A step is one model evaluation. */
export function stepText(run, step) {
  return step === MEAN ? t('step.mean', { n: run.count }) : t('step', { step: step + 1, total: run.total })
}

/** "σ 0.432"; nothing for a mean, and where the sampler has none. */
export function sigmaText(run, step) {
  const sigma = step === MEAN ? NaN : run.steps[step].sigma
  return Number.isFinite(sigma) ? t('sigma', { sigma: sigma.toPrecision(3) }) : ''
}

export function frameText(run, frame) {
  return frame === null ? t('frame.mean', { n: run.frames }) : t('frame', { frame: frame + 1, total: run.frames })
}

/** "block 3 (single 0)": counted from 1, as DyDiT Heatmap does, and by its kind. */
export const blockText = (run, block) => t('block', { n: block + 1, name: run.blocks[block] })

/** Of a map that is not the mean of all, the block, the prompt and the frame. */
export function partText(run, { block, branch, frame }) {
  return line([block !== MEAN && blockText(run, block), branch && t(`branch.${branch}`), frame !== null && frameText(run, frame)])
}

/** Where a map was taken: the step, and whatever else is not a mean. */
export const whereText = (run, at) => line([stepText(run, at.step), sigmaText(run, at.step), partText(run, at)])

/** "tokens 62 %", "FLOPs 51 %" and "0.42 s", as far as they are known. Beside a single block, prompt or frame, "step FLOPs 51 %":
    FLOPs and seconds are those of the whole step, and tokens those of all frames. */
export function costParts(run, { step, block, branch, frame }) {
  const tokens = run.keptAt(step, block, branch)
  const flops = run.flopsAt(step)
  const seconds = run.secondsAt(step)
  return [
    tokens === null ? '' : t(frame === null ? 'cost.tokens' : 'cost.tokens.frames', { share: percent(tokens) }),
    flops === null ? '' : t(block === MEAN && branch === null && frame === null ? 'cost.flops' : 'cost.flops.step', { share: percent(flops) }),
    seconds === null ? '' : t('cost.seconds', { seconds: seconds.toPrecision(2) })
  ]
}

export const costText = (run, at) => line(costParts(run, at))

function placeText(axis, cell, cells, tokens) {
  const [first, last] = tokensOf(cell, cells, tokens).map((token) => token + 1)
  return t(first === last ? `token.${axis}` : `token.${axis}s`, { first, last })
}

/** "row 3, column 7", or "rows 9–12, …" where one cell holds several tokens: counted from 1 in the picture's own grid. */
export function cellText({ row, col }, { rows, cols, token_rows, token_cols }) {
  return t('token.place', {
    row: placeText('row', row, rows, token_rows), column: placeText('column', col, cols, token_cols)
  })
}

/** What the panes have at a cell: "row 3, column 7: 62 %", or "…: A 62 % · B 40 %"; '' where none has it. */
export function tokenText(cell, panes, key = 'token') {
  const read = panes.filter(({ map }) => map && cell.row < map.rows && cell.col < map.cols)
  if (!read.length) return ''
  const share = line(read.map(({ letter, map }) =>
    `${letter}${letter && '\u00a0'}${percent(map.bytes[cell.row * map.cols + cell.col] / 255)}`))
  return t(key, { place: cellText(cell, read[0].map), share })
}

/** What stands in place of a map that is not there. */
export function emptyText({ run, at, error, later }) {
  if (later) return t('map.later')
  if (error) return t('map.gone', { why: error })
  if (run.notice) return t('map.gone', { why: run.notice })
  if (!run.id) return t('map.none')
  if (at) return '' // it is on its way
  return t(run.status.state === 'running' ? 'map.waiting' : 'map.nothing')
}

/** "A: asked 60 % · tokens 62 % · FLOPs 51 %": one run's numbers beside another's. */
export function compareText({ letter, run, at }) {
  const { asked, ignored } = run.status
  const numbers = line([
    asked > 0 && !ignored && t('compare.asked', { share: percent(asked) }), at && costText(run, at)
  ])
  return t('compare.run', { letter, numbers: numbers || t('map.waiting') })
}

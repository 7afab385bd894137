// Which step, block, branch and frame one looks at. No DOM, no ComfyUI.

export const MEAN = 'mean'

/** What a new node and a new run show: the newest step (null follows it), all blocks, branches and frames together. */
export const DEFAULT = Object.freeze({ step: null, block: MEAN, branch: null, frame: null })

/** The selection as far as a run has it, with a step in place of "the newest"; null while it has no step. */
export function resolve({ step, block, branch, frame }, run) {
  if (!run.count) return null
  return {
    step: step === MEAN ? MEAN : run.nearestStep(step ?? run.latest),
    block: block === MEAN || block < run.blocks.length ? block : MEAN,
    branch: run.branches.length > 1 && run.branches.includes(branch) ? branch : null,
    frame: run.frames < 2 ? null : lastOf(frame, run.frames)
  }
}

/** A frame as far as there are `count`: the last one stays where a video has ended, and their mean is null. */
export const lastOf = (frame, count) => (frame === null ? null : Math.min(frame, count - 1))

/** The step to hold on to: the last one of all follows a run that goes on. */
export const held = (step, run) => (step !== MEAN && step >= run.latest ? null : step)

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
const toIndex = (place) => (place === MEAN ? -1 : place)
const toPlace = (index) => (index < 0 ? MEAN : index)

/** The next step in a direction that is known; before the first is the mean of all. */
function stepFrom(step, by, run) {
  let index = toIndex(step) + by
  while (index >= 0 && index < run.latest && !run.steps[index]) index += by
  return toPlace(Math.min(index, run.latest))
}

/** Where a key moves among a run's steps and blocks: the new step and block, or undefined for a key that is not ours. */
export function moveByKey({ step, block }, key, run) {
  if (key === 'Home') return { step: MEAN, block }
  if (key === 'End') return { step: run.latest, block }
  if (!MOVES[key]) return undefined
  const [across, down] = MOVES[key]
  return {
    step: across ? stepFrom(step, across, run) : step,
    block: toPlace(Math.min(toIndex(block) + down, run.blocks.length - 1))
  }
}

/** Which of `count` equal parts of a box a point lies in, along one axis; before the box are the means. */
export function placeAt(point, start, size, count) {
  if (point < start) return MEAN
  return Math.max(Math.min(Math.floor(((point - start) / size) * count), count - 1), 0)
}

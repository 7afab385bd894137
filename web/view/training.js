// A training on its node: what is done and how long it will take, and the error at each budget over the steps.
// It knows nothing of ComfyUI.

import { domOf } from '../dom.js'
import { t } from '../strings.js'
import { percent } from '../words.js'

const MIN_HEIGHT = 210 // CSS pixels: a chart of some 120, its legend and two lines
const BOX = { width: 300, height: 120, left: 34, right: 6, top: 8, bottom: 18 } // of the chart, in its own units
const MINUTE = 60
// Of Okabe and Ito: told apart with every kind of colour vision, on light nodes and on dark ones.
const COLOURS = ['#56b4e9', '#e69f00', '#009e73', '#cc79a7', '#d55e00', '#8a8a8a']

/** Seconds in words that fit on a line. */
export function duration(seconds) {
  if (seconds < 1.5 * MINUTE) return t('training.seconds', { count: Math.max(1, Math.round(seconds)) })
  const minutes = Math.round(seconds / MINUTE)
  return minutes < 100 ? t('training.minutes', { count: minutes }) : t('training.hours', { count: (minutes / MINUTE).toFixed(1) })
}

/** What is going on, in a line. */
export function progressText({ state, done, total, seconds, left }) {
  const running = state === 'recording' || state === 'training'
  const parts = [done === undefined ? t(`state.${state}`) : t(`training.${state}`, { done, total })]
  if (running && Number.isFinite(seconds) && seconds) parts.push(t('training.each', { seconds: seconds < 10 ? seconds.toFixed(1) : Math.round(seconds) }))
  if (running && Number.isFinite(left)) parts.push(t('training.left', { time: duration(left) }))
  return parts.join(t('list'))
}

/** Round numbers from `low` to `high`, some four of them. */
export function ticks(low, high) {
  const rough = (high - low) / 4
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough)
  const found = []
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step)
  return found
}

export class TrainingView {
  #draw
  #make

  constructor(document) {
    const { make, draw } = domOf(document)
    this.#make = make
    this.#draw = draw
    this.progress = make('div', { class: 'dydit-training-progress' })
    this.bar = make('progress', { max: '1', value: '0', 'aria-label': t('training.bar') })
    this.chart = draw('svg', { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: 'img', 'aria-label': t('training.chart') })
    this.legend = make('div', { class: 'dydit-training-legend' })
    this.lines = make('div', { class: 'dydit-training-lines' })
    this.root = make('div', { class: 'dydit-panel dydit-training', 'data-testid': 'dydit-training', role: 'group', 'aria-label': t('training') },
      this.progress, this.bar, this.chart, this.legend, this.lines)
    this.root.style.setProperty('min-height', `${MIN_HEIGHT}px`) // Nodes 2.0 goes by this
    this.progress.textContent = t('training.none')
    this.bar.hidden = true
  }

  get minHeight() {
    return MIN_HEIGHT
  }

  /** Show a `dydit.training` event; it holds all there is to show. */
  show(event) {
    const { state, done, total, lines, budgets = [], steps = [], errors = [] } = event
    this.progress.textContent = progressText(event)
    this.bar.hidden = !total
    this.bar.setAttribute('value', total ? done / total : 0)
    this.lines.replaceChildren(...lines.map((line) => this.#make('div', {}, line)))
    const curves = budgets.map((budget, i) => ({
      budget, colour: COLOURS[i % COLOURS.length], points: steps.map((step, at) => [step, errors[at][i]]).filter(([, error]) => error !== null)
    })).filter(({ points }) => points.length)
    this.#drawChart(curves, steps)
    Object.assign(this.root.dataset, { state, done: done ?? '', total: total ?? '', curves: curves.length, points: steps.length })
  }

  #drawChart(curves, steps) {
    const values = curves.flatMap(({ points }) => points.map(([, error]) => error))
    this.chart.hidden = !values.length
    this.legend.replaceChildren(...curves.map((curve) => this.#entry(curve)))
    if (!values.length) return this.chart.replaceChildren()
    const room = Math.max(1, 0.08 * (Math.max(...values) - Math.min(...values)))
    const low = Math.min(...values) - room
    const high = Math.max(...values) + room
    const last = Math.max(...steps, 2)
    const x = (step) => BOX.left + ((step - 1) / (last - 1)) * (BOX.width - BOX.left - BOX.right)
    const y = (error) => BOX.top + ((high - error) / (high - low)) * (BOX.height - BOX.top - BOX.bottom)
    const grid = ticks(low, high).flatMap((tick) => [
      this.#draw('line', { x1: BOX.left, x2: BOX.width - BOX.right, y1: y(tick), y2: y(tick) }),
      this.#text(`${+tick.toFixed(2)}`, { x: BOX.left - 4, y: y(tick) + 3, 'text-anchor': 'end' })
    ])
    const drawn = curves.map(({ colour, points }) => this.#draw('polyline', {
      points: points.map(([step, error]) => `${x(step).toFixed(1)},${y(error).toFixed(1)}`).join(' '), stroke: colour
    }))
    const foot = BOX.height - 5
    this.chart.replaceChildren(...grid, ...drawn,
      this.#text(t('training.db'), { x: 2, y: foot }), this.#text(t('training.step', { step: last }), { x: BOX.width - BOX.right, y: foot, 'text-anchor': 'end' }))
  }

  #text(words, attributes) {
    return this.#draw('text', attributes, words)
  }

  /** The name of a line: its budget, and the error by now. */
  #entry({ budget, colour, points }) {
    const swatch = this.#make('i', {})
    swatch.style.setProperty('background', colour)
    return this.#make('span', {}, swatch, t('training.entry', { budget: percent(budget), error: points.at(-1)[1].toFixed(1) }))
  }
}

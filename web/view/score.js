// The bars of the steps' FLOPs, and under them the matrix of steps × blocks: where one chooses what the map shows.

import { putPixels, trackPointer } from '../dom.js'
import { barsPath, outlinePath, paintScore, rulesPath } from '../score.js'
import { MEAN, moveByKey, placeAt } from '../selection.js'
import { t } from '../strings.js'
import { costText, whereText } from '../words.js'

const stretched = { preserveAspectRatio: 'none', 'aria-hidden': 'true' }
const SLIDER_KEYS = { ArrowUp: 'ArrowRight', ArrowDown: 'ArrowLeft' } // as every slider has them

export class ScoreView {
  #front = null
  #painted = ''

  /** `select({ step, block }, spoken)` is told what was chosen, `reset()` that all is wanted again. */
  constructor(dom, { select, reset }) {
    this.#build(dom)
    this.#listen(select, reset)
  }

  #build({ make, draw }) {
    const bars = (...more) => draw('svg', stretched, ...more)
    this.rules = draw('path', { class: 'dydit-rules' })
    this.bars = draw('path', { class: 'dydit-bars' })
    this.column = draw('rect', { class: 'dydit-column', width: 1, height: 1 })
    this.barShown = draw('path', { class: 'dydit-bar-shown' })
    this.other = draw('path', { class: 'dydit-other' })
    this.asked = draw('line', { class: 'dydit-asked', x1: 0 })
    this.barsBox = bars(this.column, this.rules, this.bars, this.barShown, this.other, this.asked)
    this.meanRules = draw('path', { class: 'dydit-rules' })
    this.meanBar = draw('path', { class: 'dydit-bars' })
    this.stepsBox = make('div', { class: 'dydit-steps' }, this.barsBox)
    this.steps = make('div', {
      class: 'dydit-slider dydit-columns', role: 'slider', tabindex: 0, title: t('score.steps.title'),
      'aria-label': t('score.steps.label')
    }, make('div', { class: 'dydit-steps' }, draw('svg', { ...stretched, viewBox: '0 0 1 1' }, this.meanRules, this.meanBar)), this.stepsBox)
    this.parts = Object.fromEntries(['corner', 'all', 'mean', 'body'].map((name) => [name, make('canvas', { class: `dydit-${name}` })]))
    this.marker = make('div', { class: 'dydit-marker' })
    this.cursor = make('div', { class: 'dydit-plane' }, this.marker)
    this.matrix = make('div', {
      class: 'dydit-matrix dydit-columns', role: 'application', tabindex: 0, title: t('score.matrix.title'),
      'aria-label': t('score.matrix.label')
    }, ...Object.values(this.parts), this.cursor)
    this.blocks = make('div', { class: 'dydit-axes dydit-blocks' },
      make('span', {}, t('score.all')), make('span', {}, t('score.blocks')), this.matrix)
    this.root = make('div', { class: 'dydit-score' },
      make('div', { class: 'dydit-axes' }, make('span', {}, t('score.flops')), this.steps), this.blocks)
  }

  #listen(select, reset) {
    const stepAt = (x) => {
      const box = this.stepsBox.getBoundingClientRect()
      const step = placeAt(x, box.left, box.width, this.#front.run.total)
      return step === MEAN ? MEAN : Math.min(step, this.#front.run.latest)
    }
    trackPointer(this.steps, (event) => select({ step: stepAt(event.clientX) }))
    trackPointer(this.matrix, (event) => {
      const box = this.parts.body.getBoundingClientRect()
      select({ step: stepAt(event.clientX), block: placeAt(event.clientY, box.top, box.height, this.#front.run.blocks.length) })
    })
    const key = (event, name, only) => {
      if (!this.#front) return
      const place = name === 'Escape' ? null : moveByKey(this.#front.at, name, this.#front.run)
      if (place === undefined) return
      event.preventDefault()
      if (place) select(only(place), true)
      else reset()
    }
    this.steps.addEventListener('keydown', (event) =>
      key(event, SLIDER_KEYS[event.key] ?? event.key, ({ step }) => ({ step })))
    this.matrix.addEventListener('keydown', (event) => key(event, event.key, (place) => place))
  }

  draw({ front, sides }) {
    this.#front = front.at ? front : null
    this.root.hidden = !front.at
    if (!front.at) return
    this.#drawBars(front, sides.find((side) => side.run !== front.run))
    this.#drawMatrix(front)
  }

  #drawBars({ run, at }, other) {
    const { total, status } = run
    const shares = flopsOf(run)
    const overall = [run.flopsAt(MEAN)]
    this.barsBox.setAttribute('viewBox', `0 0 ${total} 1`)
    this.rules.setAttribute('d', rulesPath(shares, total))
    this.bars.setAttribute('d', barsPath(shares, total))
    this.other.setAttribute('d', other?.at ? outlinePath(flopsOf(other.run), total) : '')
    this.meanRules.setAttribute('d', rulesPath(overall, 1))
    this.meanBar.setAttribute('d', barsPath(overall, 1))
    this.meanBar.classList.toggle('is-shown', at.step === MEAN)
    this.barShown.setAttribute('d', at.step === MEAN ? '' : barsPath(shares.map((share, i) => (i === at.step ? share : null)), total))
    this.column.style.display = at.step === MEAN ? 'none' : ''
    if (at.step !== MEAN) this.column.setAttribute('x', at.step)
    const line = 1 - (status.asked ?? 1)
    this.asked.style.display = status.ignored ? 'none' : ''
    for (const [name, value] of [['x2', total], ['y1', line], ['y2', line]]) this.asked.setAttribute(name, value)
    for (const [name, value] of [['min', 0], ['max', run.latest + 1], ['now', at.step === MEAN ? 0 : at.step + 1]])
      this.steps.setAttribute(`aria-value${name}`, value)
    this.steps.setAttribute('aria-valuetext', `${whereText(run, at)}, ${costText(run, at)}`)
  }

  #drawMatrix({ run, at }) {
    const shown = [run.id, run.revision, at.branch].join()
    if (shown !== this.#painted) {
      const painted = paintScore(run, at.branch)
      for (const [name, canvas] of Object.entries(this.parts)) putPixels(canvas, painted[name])
      this.root.style.setProperty('--dydit-blocks', run.blocks.length)
      this.#painted = shown
    }
    const across = at.step === MEAN ? null : [at.step / run.total, 1 / run.total]
    const down = at.block === MEAN ? null : [at.block / run.blocks.length, 1 / run.blocks.length]
    this.cursor.className = `dydit-plane ${across ? 'has-step' : ''} ${down ? 'has-block' : ''}`
    const percent = (share) => `${100 * share}%`
    Object.assign(this.marker.style, {
      left: percent(across?.[0] ?? 0), width: percent(across?.[1] ?? 1),
      top: percent(down?.[0] ?? 0), height: percent(down?.[1] ?? 1)
    })
  }
}

const flopsOf = (run) => Array.from({ length: run.total }, (_, i) => run.flopsAt(i))

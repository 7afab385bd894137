// The numbers of the run that is shown, or of both runs of a comparison, and which of them the map shows.

import { t } from '../strings.js'
import { compareText, costParts, costText, line, partText, sigmaText, stepText, whereText } from '../words.js'

const SIDES = ['a', 'b', 'both']

export class CompareView {
  /** `look(side)` is told which run to show. */
  constructor({ make, choice }, look) {
    this.where = make('span', { class: 'dydit-where' }) // not <output>: a screen reader must not be told of every step
    this.sigma = make('span', { class: 'dydit-sigma' })
    this.part = make('span', { class: 'dydit-part' })
    this.cost = make('span', { class: 'dydit-cost' })
    this.seconds = make('span', { class: 'dydit-seconds' })
    this.side = choice(t('compare'), SIDES.map((side) => [side, t(`compare.${side}`), t(`compare.${side}.label`)]), look)
    this.lines = ['A', 'B'].map(() => make('div', { class: 'dydit-side' }))
    this.both = make('div', {}, ...this.lines)
    this.root = make('div', { class: 'dydit-numbers' },
      make('div', { class: 'dydit-row' }, this.where, this.sigma, this.part, this.cost, this.seconds, this.side.root), this.both)
  }

  draw({ record, front, sides }) {
    const { run, at } = front
    const pinned = record.pinned !== null
    this.root.hidden = !at && !pinned
    this.#drawShown(run, at, pinned)
    this.both.hidden = !pinned
    this.side.root.hidden = !record.compares
    if (!pinned) return
    this.side.set(record.compare)
    this.lines.forEach((element, i) => {
      element.textContent = sides[i] ? compareText(sides[i]) : t('compare.wait')
      element.classList.toggle('is-front', sides[i] === front)
    })
  }

  #drawShown(run, at, pinned) {
    const [tokens, flops, seconds] = at && !pinned ? costParts(run, at) : ['', '', '']
    this.where.textContent = at ? stepText(run, at.step) : ''
    this.sigma.textContent = at ? sigmaText(run, at.step) : ''
    this.part.textContent = at ? partText(run, { ...at, frame: null }) : '' // the slider says which frame
    this.cost.textContent = line([tokens, flops])
    this.seconds.textContent = seconds
    this.root.setAttribute('title', at ? line([whereText(run, at), costText(run, at)]) : '')
  }
}

// The server's own words about the run.

import { t } from '../strings.js'
import { percent } from '../words.js'

export class StatusView {
  #shown = ''

  constructor({ make }) {
    this.make = make
    this.root = make('div', { class: 'dydit-status', 'aria-live': 'polite', 'data-capture-wheel': 'true' })
  }

  /** `budget`: where the slider stands, which may have been moved since. */
  draw({ front: { run, at } }, budget) {
    const { state, lines, asked, floor } = run.status
    const moved = run.ended && floor && Math.abs(budget - asked) > 0.005
    const all = [
      ...lines,
      ...(run.notice && at ? [t('map.gone', { why: run.notice })] : []),
      ...(moved ? [t('status.moved', { now: percent(budget), asked: percent(asked), floor: percent(floor) })] : [])
    ]
    const shown = JSON.stringify([state, all])
    if (shown === this.#shown) return // untouched, it is not read out again
    this.#shown = shown
    const { make } = this
    this.root.replaceChildren(...all.map((line) => make('p', {}, line)))
    if (state) this.root.firstElementChild?.prepend(make('span', { class: 'dydit-state' }, t(`state.${state}`)))
  }
}

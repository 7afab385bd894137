// The server's own words about the run.

import { t } from '../strings.js'

export class StatusView {
  #shown = ''

  constructor({ make }) {
    this.make = make
    this.root = make('div', { class: 'dydit-status', 'aria-live': 'polite', 'data-capture-wheel': 'true' })
  }

  draw({ front: { run, at } }) {
    const { state, lines } = run.status
    const all = run.notice && at ? [...lines, t('map.gone', { why: run.notice })] : lines
    const shown = JSON.stringify([state, all])
    if (shown === this.#shown) return // untouched, it is not read out again
    this.#shown = shown
    const { make } = this
    this.root.replaceChildren(...all.map((line) => make('p', {}, line)))
    if (state) this.root.firstElementChild?.prepend(make('span', { class: 'dydit-state' }, t(`state.${state}`)))
  }
}

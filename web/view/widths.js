// Which heads and channel groups were computed: a tick for each, or their share where a mean is shown.

import { ticksPath } from '../score.js'
import { t } from '../strings.js'
import { percent } from '../words.js'

const WIDTHS = ['heads', 'groups']

export class WidthsView {
  constructor({ make, draw }) {
    this.rows = WIDTHS.map((width) => {
      const path = draw('path')
      const box = draw('svg', { class: 'dydit-ticks', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, path)
      const number = make('span', { class: 'dydit-number' })
      const root = make('div', { class: 'dydit-axes', title: t('widths.title') },
        make('span', {}, t(`widths.${width}`)), make('div', { class: 'dydit-row' }, box, number))
      return { width, path, box, number, root }
    })
    this.root = make('div', { class: 'dydit-widths' }, ...this.rows.map(({ root }) => root))
  }

  draw({ front: { run, at, map } }) {
    this.root.hidden = !at || !run.hasWidths
    if (this.root.hidden) return
    for (const { width, path, box, number, root } of this.rows) {
      const share = run.widthAt(width, at.step, at.block)
      const flags = map?.[width]
      root.hidden = share === null
      if (root.hidden) continue
      box.setAttribute('viewBox', `0 0 ${flags ? flags.length : 1} 1`)
      box.classList.toggle('is-share', !flags)
      path.setAttribute('d', flags ? ticksPath(flags) : `M0 1V0H${share}V1z`)
      const n = flags && [...flags].filter((flag) => flag === '1').length
      number.textContent = flags ? t('widths.count', { n, total: flags.length }) : percent(share)
    }
  }
}

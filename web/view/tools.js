// The row of tools: fade to the picture, pin, copy, details.

import { keepPointer } from '../dom.js'
import { t } from '../strings.js'
import { percent } from '../words.js'

export class ToolsView {
  constructor({ make }, { fade, pin, copy, details }) {
    const button = (act) => {
      const element = make('button', { type: 'button' })
      element.addEventListener('click', act)
      return element
    }
    this.fade = make('input', { type: 'range', min: 0, max: 100, step: 5, 'aria-label': t('tools.picture.label') })
    this.fade.addEventListener('input', () => fade(Number(this.fade.value) / 100))
    keepPointer(this.fade)
    this.fadeBox = make('label', { class: 'dydit-fade', title: t('tools.picture.label') },
      t('tools.map'), this.fade, t('tools.picture'))
    this.pin = button(pin)
    this.copy = button(copy)
    this.copy.textContent = t('tools.copy')
    this.copy.title = t('tools.copy.title')
    this.details = button(details)
    this.details.textContent = t('tools.details')
    this.details.title = t('tools.details.title')
    this.root = make('div', { class: 'dydit-row dydit-tools' }, this.fadeBox, this.pin, this.copy, this.details)
  }

  draw({ record, front, panes }, { picture, hasPicture, details }) {
    this.root.hidden = !front.at && !record.pinned
    this.copy.disabled = !panes.every(({ map }) => map) // a run that is waited for has nothing to copy yet
    this.fadeBox.hidden = !hasPicture
    this.fade.value = Math.round(100 * picture)
    this.fade.setAttribute('aria-valuetext',
      t('tools.picture.value', { map: percent(1 - picture), picture: percent(picture) }))
    const name = record.pinned ? 'tools.unpin' : 'tools.pin'
    this.pin.textContent = t(name)
    this.pin.title = t(`${name}.title`)
    this.details.setAttribute('aria-expanded', details)
  }

  /** Say on the button what became of a copy. */
  sayCopied(key) {
    this.copy.textContent = t(key)
  }
}

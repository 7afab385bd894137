// A video's frames: a slider, from their mean to the last, and a button that plays them.

import { keepPointer } from '../dom.js'
import { lastOf } from '../selection.js'
import { t } from '../strings.js'
import { frameText } from '../words.js'

const SHOWN = 160 // milliseconds of each frame

export class FramesView {
  #frame = null
  #count = 0
  #waits = false // for a map that is on its way
  #plays = false
  #timer = null

  /** `select(part)` is told which frame was chosen, by hand or by playing. */
  constructor({ make }, select) {
    this.select = select
    this.play = make('button', { type: 'button' })
    this.play.addEventListener('click', () => {
      this.#setPlaying(!this.#plays)
      if (this.#plays) this.#next()
    })
    this.slider = make('input', { type: 'range', min: -1, step: 1, 'aria-label': t('choose.frame') })
    this.slider.addEventListener('input', () => {
      this.#setPlaying(false)
      select({ frame: Number(this.slider.value) < 0 ? null : Number(this.slider.value) })
    })
    keepPointer(this.slider)
    this.text = make('span', { class: 'dydit-number' })
    this.root = make('div', { class: 'dydit-row dydit-frames' }, this.play, this.slider, this.text)
    this.#setPlaying(false)
  }

  #next() {
    this.#timer = null
    if (!this.root.isConnected) return this.#setPlaying(false)
    if (this.#waits) return this.#later()
    this.select({ frame: ((this.#frame ?? -1) + 1) % this.#count })
  }

  #later() {
    this.#timer ??= setTimeout(() => this.#next(), SHOWN)
  }

  #setPlaying(plays) {
    this.#plays = plays
    clearTimeout(this.#timer)
    this.#timer = null
    const name = t(plays ? 'frame.stop' : 'frame.play')
    this.play.textContent = plays ? '■' : '▶'
    this.play.title = name
    this.play.setAttribute('aria-label', name)
  }

  /** Of two runs side by side the longer one has the slider; the other one's map is then that of its last frame. */
  draw({ record, panes, front: { at } }) {
    const count = this.#count = Math.max(...panes.map(({ run }) => run.frames))
    this.root.hidden = !at || count < 2
    if (this.root.hidden) return // and played on when the next run has frames
    const frame = this.#frame = lastOf(record.selection.frame, count)
    this.#waits = panes.some((pane) => pane.path && !pane.map)
    this.slider.max = count - 1
    this.slider.value = frame ?? -1
    this.text.textContent = frameText({ frames: count }, frame)
    this.slider.setAttribute('aria-valuetext', this.text.textContent)
    if (panes.some((pane) => pane.error)) this.#setPlaying(false)
    else if (this.#plays) this.#later()
  }
}

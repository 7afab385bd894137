// A video's frames: a slider, from their mean to the last, and a button that plays them.

import { keepPointer } from '../dom.js'
import { t } from '../strings.js'
import { frameText } from '../words.js'

const SHOWN = 160 // milliseconds of each frame

export class FramesView {
  #frame = null
  #count = 0
  #playing = null // the timer of the next frame

  /** `select(part)` is told which frame was chosen, by hand or by playing. */
  constructor({ make }, select) {
    this.select = select
    this.play = make('button', { type: 'button' })
    this.play.addEventListener('click', () => (this.#playing === null ? this.#next() : this.#stop()))
    this.slider = make('input', { type: 'range', min: -1, step: 1, 'aria-label': t('choose.frame') })
    this.slider.addEventListener('input', () => {
      this.#stop()
      select({ frame: Number(this.slider.value) < 0 ? null : Number(this.slider.value) })
    })
    keepPointer(this.slider)
    this.text = make('span', { class: 'dydit-number' })
    this.root = make('div', { class: 'dydit-row dydit-frames' }, this.play, this.slider, this.text)
  }

  #next() {
    if (this.#playing !== null && !this.root.isConnected) return this.#stop()
    this.#playing = setTimeout(() => this.#next(), SHOWN)
    this.select({ frame: ((this.#frame ?? -1) + 1) % this.#count })
  }

  #stop() {
    clearTimeout(this.#playing)
    this.#playing = null
    this.#label()
  }

  #label() {
    const name = t(this.#playing === null ? 'frame.play' : 'frame.stop')
    this.play.textContent = this.#playing === null ? '▶' : '■'
    this.play.title = name
    this.play.setAttribute('aria-label', name)
  }

  draw({ front: { run, at } }) {
    this.root.hidden = !at || run.frames < 2
    if (this.root.hidden) return this.#stop()
    this.#frame = at.frame
    this.#count = run.frames
    this.slider.max = run.frames - 1
    this.slider.value = at.frame ?? -1
    this.text.textContent = frameText(run, at.frame)
    this.slider.setAttribute('aria-valuetext', this.text.textContent)
    this.#label()
  }
}

// One run's map: its cells, the picture under them, and the cursor that reads a cell.

import { putPixels } from '../dom.js'
import { hitTest, mayCover, moveCursor, paint } from '../heatmap.js'
import { t } from '../strings.js'
import { costText, emptyText, whereText } from '../words.js'

export class Pane {
  #shown = null // the map that is painted
  #pane = null
  #picture = null
  #pictureUrl = ''

  /** `hover(cell)` and `pin(cell, spoken)` are told of the cell under the pointer and of the one chosen. */
  constructor({ make, draw }, { hover, pin }) {
    this.canvas = make('canvas', { 'aria-hidden': 'true' })
    this.image = make('img', { alt: '', draggable: 'false' })
    this.image.hidden = true
    this.cursor = draw('g', {}, draw('rect', { width: 1, height: 1 }), draw('rect', { width: 1, height: 1 }))
    this.overlay = draw('svg', { preserveAspectRatio: 'none', 'aria-hidden': 'true' }, this.cursor)
    this.letter = make('span', { class: 'dydit-letter', 'aria-hidden': 'true' })
    this.cells = make('div', { class: 'dydit-cells', tabindex: 0, role: 'application' },
      this.image, this.canvas, this.overlay, this.letter)
    this.empty = make('div', { class: 'dydit-empty' })
    this.root = make('div', { class: 'dydit-pane' }, this.cells, this.empty)
    this.#listen(hover, pin)
  }

  #listen(hover, pin) {
    const at = (event) => this.#shown && hitTest(
      event.clientX, event.clientY, this.cells.getBoundingClientRect(), this.#shown.rows, this.#shown.cols)
    this.cells.addEventListener('pointermove', (event) => hover(at(event)))
    this.cells.addEventListener('pointerleave', () => hover(null))
    this.cells.addEventListener('click', (event) => pin(at(event), false))
    this.cells.addEventListener('keydown', (event) => {
      const cell = this.#shown && moveCursor(this.cell, event.key, this.#shown.rows, this.#shown.cols)
      if (!this.#shown || cell === undefined) return
      event.preventDefault()
      pin(cell, true)
    })
    this.image.addEventListener('load', () => this.#fitPicture())
  }

  /** Draw a pane of a scene, or nothing. */
  draw(pane) {
    this.root.hidden = !pane
    this.#pane = pane
    if (!pane) return
    const { map, at, run, letter } = pane
    const ready = Boolean(map)
    const waits = Boolean(at && pane.path && !map && !pane.error)
    if (!waits) this.#paint(map) // while one map is on its way the last one stays, dimmed
    this.cells.hidden = !this.#shown
    this.cells.classList.toggle('is-waiting', waits)
    this.cells.setAttribute('aria-busy', waits)
    this.empty.hidden = ready || waits
    this.empty.textContent = emptyText(pane)
    this.letter.textContent = letter
    if (at) this.cells.setAttribute('aria-label', t('map.label', {
      rows: run.token_rows, cols: run.token_cols, where: whereText(run, at), numbers: costText(run, at)
    }))
    this.#drawPicture(run.pictureOf(at?.frame ?? null))
  }

  #paint(map) {
    if (map === this.#shown) return
    this.#shown = map
    if (!map) return
    putPixels(this.canvas, { width: map.cols, height: map.rows, pixels: paint(map.bytes) })
    this.overlay.setAttribute('viewBox', `0 0 ${map.cols} ${map.rows}`)
    this.root.style.setProperty('--dydit-aspect', map.cols / map.rows)
  }

  /** A picture is an address, or a Blob while it is a preview. */
  #drawPicture(picture) {
    if (picture === this.#picture) return this.#fitPicture()
    if (this.#pictureUrl.startsWith('blob:')) URL.revokeObjectURL(this.#pictureUrl)
    this.#picture = picture
    this.#pictureUrl = picture instanceof Blob ? URL.createObjectURL(picture) : picture ?? ''
    if (picture) this.image.src = this.#pictureUrl
    else this.image.hidden = true
  }

  #fitPicture() {
    const { naturalWidth, naturalHeight } = this.image
    const covers = this.#pane && naturalWidth > 0 && mayCover(this.#pane.run, naturalWidth, naturalHeight)
    this.image.hidden = !this.#picture || !covers
    this.fitted?.()
  }

  get hasPicture() {
    return !this.image.hidden
  }

  /** Show the cursor at a cell, or take it away. */
  point(cell) {
    const map = this.#shown
    const inside = map && cell && cell.row < map.rows && cell.col < map.cols
    this.cell = inside ? cell : null
    this.cursor.style.display = inside ? '' : 'none'
    if (inside) this.cursor.setAttribute('transform', `translate(${cell.col} ${cell.row})`)
  }
}

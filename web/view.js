// The token map's DOM: it shows a RunRecord and reads single tokens of it. It knows nothing of ComfyUI, and the
// document is handed in, so that it can be tested outside a browser.

import {
  barsPath, cividisGradient, costText, decodeGrid, hitTest, moveCursor, paint, stepText, tokenText
} from './heatmap.js'

/** What the view needs, in CSS pixels: view.css says the same to Nodes 2.0. */
export const MIN_HEIGHT = 320

const SVG = 'http://www.w3.org/2000/svg'
const HINT = 'point at a token, or press arrow keys on the map'
const NO_MAP = 'No map yet. Run the workflow to see, step by step, which tokens the model computes. ' +
  'A result that comes from the cache has none: change the seed.'
const NOTHING_SAMPLED = 'No map: see below.'
const UNREADABLE = 'The map of this step could not be read.'
const BARS_TITLE = 'Bars: FLOPs of each step as a share of the dense model. Dashed line: the budget asked for. ' +
  'Drag to look back; the last step follows a running sampler again.'

function build(document) {
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag)
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
    element.append(...children)
    return element
  }
  const draw = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS(SVG, tag)
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
    element.append(...children)
    return element
  }
  const ui = {}

  ui.canvas = make('canvas', { 'aria-hidden': 'true' })
  ui.cursor = draw('g', {}, draw('rect', { width: 1, height: 1 }), draw('rect', { width: 1, height: 1 }))
  ui.overlay = draw('svg', { preserveAspectRatio: 'none', 'aria-hidden': 'true' }, ui.cursor)
  ui.cells = make('div', { class: 'dydit-cells', tabindex: 0, role: 'application' }, ui.canvas, ui.overlay)
  ui.empty = make('div', { class: 'dydit-empty' }, NO_MAP)

  ui.mark = make('span', { class: 'dydit-mark' })
  ui.scale = make('span', { class: 'dydit-scale', style: `background:${cividisGradient()}` }, ui.mark)
  ui.legend = make('div', { class: 'dydit-row dydit-legend' }, 'skipped 0\u00a0%', ui.scale, '100\u00a0% computed')
  ui.token = make('output', { class: 'dydit-token' })

  ui.bars = draw('path', { class: 'dydit-bars' })
  ui.columnShown = draw('rect', { class: 'dydit-column-shown', width: 1, height: 1 })
  ui.barShown = draw('path', { class: 'dydit-bar-shown' })
  ui.asked = draw('line', { class: 'dydit-asked', x1: 0 })
  ui.barsBox = draw('svg', { preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    ui.columnShown, ui.bars, ui.barShown, ui.asked)
  ui.range = make('input', {
    type: 'range', min: 0, max: 0, step: 1, value: 0, title: BARS_TITLE, 'aria-label': 'Step shown on the token map'
  })
  ui.steps = make('div', { class: 'dydit-steps' }, ui.barsBox, ui.range)
  ui.timeline = make('div', { class: 'dydit-row dydit-timeline' }, make('span', {}, 'FLOPs'), ui.steps)
  ui.step = make('span', {}) // not <output>: a screen reader must not be told of every step
  ui.cost = make('span', { class: 'dydit-cost' })

  ui.status = make('div', { class: 'dydit-status', 'aria-live': 'polite', 'data-capture-wheel': 'true' })
  ui.map = [ui.legend, ui.timeline]
  ui.root = make('div', { class: 'dydit-map', 'data-testid': 'dydit-map' },
    make('div', { class: 'dydit-stage' }, ui.cells, ui.empty),
    make('div', { class: 'dydit-row' }, ui.token), ui.legend, ui.timeline,
    make('div', { class: 'dydit-row' }, ui.step, ui.cost), ui.status)
  ui.text = (tag, attributes, text) => make(tag, attributes, text)
  return ui
}

export class MapView {
  #ui
  #record = null
  #run = ''
  #held = null // the step the user scrubbed back to; null follows the newest
  #pinned = null // the cell chosen by click or key, kept while the steps change
  #hovered = null // the cell under the pointer, which goes before the pinned one
  #shown = { frame: null, bytes: null } // what is painted
  #statusShown = ''
  #onFrame
  #queued = false

  /** `onFrame` is the browser's requestAnimationFrame: a burst of steps is painted once. */
  constructor(document, onFrame) {
    this.#ui = build(document)
    this.#onFrame = onFrame
    this.root = this.#ui.root
    this.#listen()
    this.#draw()
  }

  /** Show a record, now and whenever this is called again after the record has changed. */
  show(record) {
    this.#record = record
    if (record.run !== this.#run) {
      this.#run = record.run
      this.#held = null
    }
    if (this.#queued) return
    this.#queued = true
    this.#onFrame(() => {
      this.#queued = false
      this.#draw()
    })
  }

  #listen() {
    const { cells, range, root } = this.#ui
    range.addEventListener('input', () => {
      const step = Number(range.value)
      this.#held = step >= this.#record.latest ? null : step
      this.#draw()
    })
    // While the thumb is held, the pointer is the slider's: older Nodes 2.0 would drag the node along.
    for (const type of ['pointerdown', 'pointermove', 'pointerup'])
      range.addEventListener(type, (event) => { if (!(event.buttons & 4)) event.stopPropagation() })
    cells.addEventListener('pointermove', (event) => this.#point(event, 'hover'))
    cells.addEventListener('pointerleave', () => { this.#hovered = null; this.#drawToken() })
    cells.addEventListener('click', (event) => this.#point(event, 'pin'))
    cells.addEventListener('keydown', (event) => this.#key(event))
    // Plain keys typed here are not the graph's: Delete would remove the node, arrows would move it.
    root.addEventListener('keydown', (event) => { if (!event.ctrlKey && !event.metaKey) event.stopPropagation() })
  }

  #point(event, how) {
    const { frame } = this.#shown
    if (!frame) return
    const cell = hitTest(event.clientX, event.clientY, this.#ui.cells.getBoundingClientRect(), frame.rows, frame.cols)
    if (how === 'pin') this.#pinned = cell
    else this.#hovered = cell
    this.#drawToken()
  }

  #key(event) {
    const { frame } = this.#shown
    if (!frame) return
    const cell = moveCursor(this.#pinned, event.key, frame.rows, frame.cols)
    if (cell === undefined) return
    event.preventDefault()
    this.#pinned = cell
    this.#hovered = null
    this.#drawToken('polite')
  }

  #draw() {
    const record = this.#record
    const frame = record?.frameAt(this.#held ?? record.latest) ?? null
    this.#drawMap(frame)
    this.#drawSteps(frame)
    this.#drawToken()
    this.#drawStatus()
    Object.assign(this.root.dataset, {
      frames: record?.count ?? 0, step: frame?.step ?? '', run: this.#run,
      state: record?.status?.state ?? '', follow: this.#held === null
    })
  }

  #drawMap(frame) {
    const { canvas, cells, empty, overlay, map } = this.#ui
    const bytes = frame && decodeGrid(frame)
    this.#shown = { frame: bytes && frame, bytes }
    for (const part of map) part.hidden = !frame
    cells.hidden = !bytes
    empty.hidden = Boolean(bytes)
    empty.textContent = frame ? UNREADABLE : this.#record?.notice || (this.#record?.run ? NOTHING_SAMPLED : NO_MAP)
    if (!bytes) return
    const { rows, cols, token_rows, token_cols } = frame
    if (canvas.width !== cols) canvas.width = cols
    if (canvas.height !== rows) canvas.height = rows
    const context = canvas.getContext('2d')
    const image = context.createImageData(cols, rows)
    image.data.set(paint(bytes))
    context.putImageData(image, 0, 0)
    overlay.setAttribute('viewBox', `0 0 ${cols} ${rows}`)
    this.root.style.setProperty('--dydit-aspect', cols / rows)
    cells.setAttribute('aria-label',
      `Token map of ${token_rows} rows by ${token_cols} columns, ${stepText(frame, this.#record.total)}, ` +
      `${costText(frame)}. Arrow keys read it cell by cell.`)
  }

  #drawSteps(frame) {
    const { asked, bars, barShown, barsBox, columnShown, cost, range, step, steps } = this.#ui
    step.textContent = frame ? stepText(frame, this.#record.total) : ''
    cost.textContent = frame ? costText(frame) : ''
    if (!frame) return
    const { frames, total, status } = this.#record
    barsBox.setAttribute('viewBox', `0 0 ${total} 1`)
    bars.setAttribute('d', barsPath(frames, total))
    barShown.setAttribute('d', barsPath([frame], total))
    columnShown.setAttribute('x', frame.step)
    const line = 1 - (status?.asked ?? 1)
    for (const [name, value] of [['x2', total], ['y1', line], ['y2', line]]) asked.setAttribute(name, value)
    steps.style.setProperty('--dydit-steps', total)
    range.max = total - 1
    range.value = frame.step
    range.setAttribute('aria-valuetext', `${step.textContent}, ${cost.textContent}`)
  }

  /** `live` is "polite" only for a key press, not when a new step changes the number under the cursor. */
  #drawToken(live = 'off') {
    const { cursor, mark, token } = this.#ui
    const { frame, bytes } = this.#shown
    const cell = this.#hovered ?? this.#pinned
    const inside = frame && cell && cell.row < frame.rows && cell.col < frame.cols
    token.setAttribute('aria-live', live)
    token.classList.toggle('is-read', Boolean(inside))
    token.textContent = inside ? tokenText(cell, bytes, frame) : frame ? HINT : ''
    cursor.style.display = mark.style.display = inside ? '' : 'none'
    if (!inside) return
    cursor.setAttribute('transform', `translate(${cell.col} ${cell.row})`)
    mark.style.left = `${(bytes[cell.row * frame.cols + cell.col] / 255) * 100}%`
  }

  #drawStatus() {
    const { status: box, text } = this.#ui
    const { status, notice, count } = this.#record ?? {}
    const lines = [...(status?.lines ?? []), ...(notice && count ? [notice] : [])]
    const shown = JSON.stringify([status?.state, lines])
    if (shown === this.#statusShown) return // untouched, it is not read out again
    this.#statusShown = shown
    box.replaceChildren(...lines.map((line) => text('p', {}, line)))
    if (status) box.firstElementChild?.prepend(text('span', { class: 'dydit-state' }, status.state))
  }
}

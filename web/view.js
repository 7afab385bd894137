// The token map's DOM, put together: it draws a record's scene and turns clicks and keys into a selection. It knows
// nothing of ComfyUI, and what it needs of the browser is handed in, so that it can be tested outside one.

import { domOf } from './dom.js'
import { cividisGradient } from './heatmap.js'
import { NodeRecord } from './records.js'
import { sceneOf } from './scene.js'
import { DEFAULT, held, MEAN } from './selection.js'
import { drawSheet } from './sheet.js'
import { t } from './strings.js'
import { costText, tokenText, whereText } from './words.js'
import { ChoicesView } from './view/choices.js'
import { CompareView } from './view/compare.js'
import { FramesView } from './view/frames.js'
import { Pane } from './view/pane.js'
import { ScoreView } from './view/score.js'
import { StatusView } from './view/status.js'
import { ToolsView } from './view/tools.js'
import { WidthsView } from './view/widths.js'

/** What the view needs in height, in CSS pixels: a map of some 200 and a few lines of status, and then each part. */
const HEIGHT = { map: 330, details: 150, pinned: 40, widths: 40, frames: 26 }
const COPIED_SHOWN = 1500 // milliseconds

export class MapView {
  #record = new NodeRecord('', '')
  #scene
  #hovered = null // the cell under the pointer, which goes before the chosen one
  #chosen = null // the cell chosen by click or key, kept while the steps change
  #queued = false
  #browser
  #height = 0

  /**
   * `browser` has onFrame(draw), resized() to be told of a new minHeight, maps (a Maps), memory { get, set } of what
   * is remembered of the page, and share(canvas, file), which promises "copied" or "saved".
   */
  constructor(document, browser) {
    this.#browser = browser
    this.document = document
    this.details = browser.memory.get('details', true)
    this.picture = browser.memory.get('picture', 0.3)
    this.#build(domOf(document))
    this.#draw()
  }

  #build(dom) {
    const { make } = dom
    const events = { hover: (cell) => this.#hover(cell), pin: (cell, spoken) => this.#choose(cell, spoken) }
    this.panes = [new Pane(dom, events), new Pane(dom, events)]
    this.panes.forEach((pane) => { pane.fitted = () => this.#drawTools() })
    this.stage = make('div', { class: 'dydit-stage' }, ...this.panes.map(({ root }) => root))
    this.mark = make('span', { class: 'dydit-mark' })
    this.token = make('output', { class: 'dydit-token' })
    this.legend = make('div', { class: 'dydit-row dydit-legend', title: t('legend') }, t('legend.low'),
      make('span', { class: 'dydit-scale', style: `background:${cividisGradient()}` }, this.mark), t('legend.high'),
      make('span', { class: 'dydit-what' }, t('legend.what')), this.token)
    const select = (part, spoken) => this.#select(part, spoken)
    this.compare = new CompareView(dom, (side) => { this.#record.compare = side; this.#draw() })
    this.score = new ScoreView(dom, { select, reset: () => select(DEFAULT, true) })
    this.choices = new ChoicesView(dom, select)
    this.frames = new FramesView(dom, select)
    this.widths = new WidthsView(dom)
    this.tools = new ToolsView(dom, {
      fade: (share) => this.#fade(share), pin: () => this.#pin(), copy: () => this.#copy(), details: () => this.#toggle()
    })
    this.status = new StatusView(dom)
    this.said = make('output', { class: 'dydit-said', 'aria-live': 'polite' })
    this.root = make('div', { class: 'dydit-panel dydit-map', 'data-testid': 'dydit-map', role: 'group', 'aria-label': t('map') },
      this.stage, this.frames.root, this.legend, this.compare.root, this.score.root, this.choices.root, this.widths.root, this.tools.root,
      this.status.root, this.said)
    // Plain keys typed here are not the graph's: Delete would remove the node, arrows would move it.
    this.root.addEventListener('keydown', (event) => { if (!event.ctrlKey && !event.metaKey) event.stopPropagation() })
  }

  get minHeight() {
    const { details } = this
    const { pinned, run } = this.#record
    const parts = { details, pinned, widths: details && run.hasWidths, frames: [run, pinned].some((one) => one?.frames > 1) }
    return Object.keys(parts).reduce((sum, part) => sum + (parts[part] ? HEIGHT[part] : 0), HEIGHT.map)
  }

  /** Show a record, now and whenever this is called again after the record has changed. */
  show(record) {
    this.#record = record
    this.refresh()
  }

  /** Draw again with the next frame: a burst of steps is painted once. */
  refresh() {
    if (this.#queued) return
    this.#queued = true
    this.#browser.onFrame(() => {
      this.#queued = false
      this.#draw()
    })
  }

  #select(part, spoken = false) {
    const record = this.#record
    record.selection = { ...record.selection, ...part }
    if (part.step !== null && part.step !== undefined) record.selection.step = held(part.step, this.#scene.front.run)
    this.#draw()
    const { run, at } = this.#scene.front
    if (spoken) this.said.textContent = `${whereText(run, at)}, ${costText(run, at)}`
  }

  #pin() {
    const record = this.#record
    record.pinned = record.pinned ? null : record.run
    this.#draw()
  }

  #toggle() {
    this.details = !this.details
    this.#browser.memory.set('details', this.details)
    this.#draw()
  }

  #fade(share) {
    this.picture = share
    this.#browser.memory.set('picture', share)
    this.#drawTools()
  }

  async #copy() {
    const shown = this.panes.slice(0, this.#scene.panes.length)
    const token = this.#chosen ? tokenText(this.#chosen, this.#scene.panes) : ''
    const sheet = drawSheet(this.document, this.#scene, shown, this.picture, token)
    const how = await this.#browser.share(sheet, t('sheet.file'))
    this.tools.sayCopied(`tools.${how}`)
    this.said.textContent = how === 'saved' ? t('tools.saved.why', { file: t('sheet.file') }) : t('tools.copied')
    setTimeout(() => this.tools.sayCopied('tools.copy'), COPIED_SHOWN)
  }

  #hover(cell) {
    this.#hovered = cell
    this.#drawToken()
  }

  #choose(cell, spoken) {
    this.#chosen = cell
    if (spoken) this.#hovered = null
    this.#drawToken()
    if (spoken) this.said.textContent = cell ? tokenText(cell, this.#scene.panes, 'token.spoken') : ''
  }

  #draw() {
    const scene = sceneOf(this.#record, this.#browser.maps)
    this.#scene = scene
    this.panes.forEach((pane, i) => pane.draw(scene.panes[i] ?? null))
    for (const part of [this.frames, this.compare, this.score, this.choices, this.widths]) part.draw(scene)
    this.status.draw(scene, this.#browser.budget())
    this.legend.hidden = !scene.front.at
    this.#drawTools()
    this.#drawToken()
    this.#describe(scene)
    this.#browser.maps.want(this, scene.panes.map(({ path }) => path).filter(Boolean))
  }

  #drawTools() {
    const hasPicture = this.panes.some((pane) => !pane.root.hidden && pane.hasPicture)
    this.tools.draw(this.#scene, { picture: this.picture, hasPicture, details: this.details })
    this.root.style.setProperty('--dydit-picture', this.picture)
    this.root.classList.toggle('has-details', this.details)
    if (this.#height === this.minHeight) return
    this.#height = this.minHeight
    this.root.style.setProperty('min-height', `${this.#height}px`) // Nodes 2.0 goes by this, the classic canvas by minHeight
    this.#browser.resized()
  }

  #drawToken() {
    const { panes, front } = this.#scene
    const cell = this.#hovered ?? this.#chosen
    const text = cell ? tokenText(cell, panes) : ''
    this.token.classList.toggle('is-read', Boolean(text))
    this.token.textContent = text || (front.map ? t('map.hint') : '')
    this.panes.forEach((pane) => pane.point(cell))
    this.mark.style.display = text && front.map ? '' : 'none'
    if (text && front.map && cell.row < front.map.rows && cell.col < front.map.cols) this.mark.style.left = `${(front.map.bytes[cell.row * front.map.cols + cell.col] / 255) * 100}%`
  }

  /** What is shown, for tests and for other packs' style sheets. */
  #describe({ record, panes, front: { run, at, map } }) {
    this.root.style.setProperty('--dydit-panes', panes.length)
    if (map) this.root.style.setProperty('--dydit-aspect', map.cols / map.rows)
    Object.assign(this.root.dataset, {
      run: run.id, state: run.status.state, steps: run.count, follow: record.selection.step === null,
      step: at?.step ?? '', block: at?.block ?? '', branch: at?.branch ?? MEAN, frame: at?.frame ?? MEAN,
      map: map ? 'shown' : 'none', pinned: record.pinned?.id ?? '', side: record.compares ? record.compare : ''
    })
  }
}

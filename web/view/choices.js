// The block, the prompt and the frame by name; rows that a run does not need stay away.

import { keepPointer } from '../dom.js'
import { MEAN } from '../selection.js'
import { t } from '../strings.js'
import { blockText, frameText } from '../words.js'

const BRANCHES = ['all', 'cond', 'uncond']

export class ChoicesView {
  #names = ''

  /** `select(part)` is told what was chosen. */
  constructor({ make, choice }, select) {
    this.make = make
    this.block = make('select', { 'aria-label': t('choose.block'), title: t('choose.block') })
    this.block.addEventListener('change', () =>
      select({ block: this.block.value === MEAN ? MEAN : Number(this.block.value) }))
    this.branch = choice(t('choose.branch'),
      BRANCHES.map((name) => [name, t(`branch.${name}`), t(`branch.${name}.label`)]),
      (name) => select({ branch: name === 'all' ? null : name }))
    this.frame = make('input', { type: 'range', min: -1, step: 1, 'aria-label': t('choose.frame') })
    this.frame.addEventListener('input', () =>
      select({ frame: Number(this.frame.value) < 0 ? null : Number(this.frame.value) }))
    keepPointer(this.frame)
    this.frameText = make('span', { class: 'dydit-number' })
    this.frameRow = make('div', { class: 'dydit-row' }, this.frame, this.frameText)
    this.row = make('div', { class: 'dydit-row' }, this.block, this.branch.root)
    this.root = make('div', { class: 'dydit-choices' }, this.row, this.frameRow)
  }

  draw({ front: { run, at } }) {
    this.root.hidden = !at
    if (!at) return
    const names = run.blocks.join('\n')
    if (names !== this.#names) {
      this.#names = names
      this.block.replaceChildren(this.make('option', { value: MEAN }, t('block.all')),
        ...run.blocks.map((_, i) => this.make('option', { value: i }, blockText(run, i))))
    }
    this.block.value = String(at.block)
    this.branch.root.hidden = run.branches.length < 2
    this.branch.set(at.branch ?? 'all')
    this.frameRow.hidden = run.frames < 2
    this.frame.max = run.frames - 1
    this.frame.value = at.frame ?? -1
    this.frameText.textContent = frameText(run, at.frame)
    this.frame.setAttribute('aria-valuetext', this.frameText.textContent)
  }
}

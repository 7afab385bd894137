// The block and the prompt by name.

import { MEAN } from '../selection.js'
import { t } from '../strings.js'
import { blockText } from '../words.js'

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
    this.root = make('div', { class: 'dydit-row dydit-choices' }, this.block, this.branch.root)
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
  }
}

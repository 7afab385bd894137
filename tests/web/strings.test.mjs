import assert from 'node:assert/strict'
import { afterEach, test } from 'node:test'

import { Run } from '../../web/run.js'
import { MEAN } from '../../web/selection.js'
import { TABLES, speak, t } from '../../web/strings.js'
import { cellText, percent, stepText } from '../../web/words.js'
import { plain, step } from './fixtures.mjs'

const PLURALS = ['zero', 'one', 'two', 'few', 'many']
const placeholders = (text) => [...text.matchAll(/\{\w+\}/g)].map(String).sort()
const others = Object.entries(TABLES).filter(([language]) => language !== 'en')

/** The keys of English as a language must have them: a plural form only where that language has it. */
function keysFor(language) {
  const english = Object.keys(TABLES.en)
  const counted = english.filter((key) => `${key}.one` in TABLES.en)
  const forms = PLURALS.filter((form) => new Intl.PluralRules(language).resolvedOptions().pluralCategories.includes(form))
  return [...english.filter((key) => !PLURALS.includes(key.split('.').at(-1))), ...counted.flatMap((key) => forms.map((form) => `${key}.${form}`))].sort()
}

afterEach(() => speak('en'))

for (const [language, table] of Object.entries(TABLES))
  test(`${language} has every word, with the same blanks to fill`, () => {
    assert.deepEqual(Object.keys(table).sort(), keysFor(language))
    for (const [key, text] of Object.entries(table)) {
      assert.ok(text.trim(), key)
      assert.deepEqual(placeholders(text), placeholders(TABLES.en[key]), key)
    }
  })

for (const [language, table] of others)
  test(`${language} is no copy of the English`, () => {
    const same = Object.keys(table).filter((key) => table[key] === TABLES.en[key] && /[a-z]{4}/i.test(table[key].replace(/\{\w+\}/g, '')))
    assert.deepEqual(same.sort(), ['cost.flops', 'score.flops', 'sheet.file'])
  })

test('a percentage, a step and a mean read as the language writes them', () => {
  const run = new Run('a')
  run.addStep(step(1, { total: 20 }))
  const map = { rows: 64, cols: 64, token_rows: 256, token_cols: 256 }
  const read = (language) => {
    speak(language)
    return [percent(0.624), stepText(run, 1), stepText(run, MEAN), t('step.mean', { n: 2 }), cellText({ row: 2, col: 0 }, map)].map(plain)
  }
  assert.deepEqual(read('en'), ['62 %', 'step 2 of 20', 'mean of 1 step', 'mean of 2 steps', 'rows 9–12, columns 1–4'])
  assert.deepEqual(read('zh'), ['62%', '第 2 步，共 20 步', '1 步的平均', '2 步的平均', '第 9–12 行，第 1–4 列'])
  assert.deepEqual(read('ja'), ['62%', 'ステップ 2/20', '1ステップの平均', '2ステップの平均', '9–12行目、1–4列目'])
})

test('a language without a table gets English', () => {
  for (const locale of ['de', 'zh-TW', '', undefined]) {
    assert.equal(speak(locale), 'en')
    assert.equal(t('tools.details'), 'Details')
  }
  assert.equal(speak('ja'), 'ja')
})

test('a word that a table lacks is English', () => {
  const { 'tools.pin': pin } = TABLES.zh
  delete TABLES.zh['tools.pin']
  try {
    speak('zh')
    assert.deepEqual([t('tools.pin'), t('tools.copy')], ['Pin', '复制'])
  } finally {
    TABLES.zh['tools.pin'] = pin
  }
})

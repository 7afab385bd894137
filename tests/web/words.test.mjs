import assert from 'node:assert/strict'
import { test } from 'node:test'

import { Run } from '../../web/run.js'
import { MEAN } from '../../web/selection.js'
import { cellText, compareText, costText, emptyText, percent, tokenText, whereText } from '../../web/words.js'
import { plain, status, step, summary } from './fixtures.mjs'

const at = (part) => ({ step: 0, block: MEAN, branch: null, frame: null, ...part })

function runOf(...parts) {
  const run = new Run('a')
  run.addStep(step(...parts))
  return run
}

test('only nothing reads 0 % and only everything reads 100 %', () => {
  assert.deepEqual([0, 0.001, 0.624, 0.999, 1].map(percent).map(plain), ['0 %', '1 %', '62 %', '99 %', '100 %'])
})

test('where a map was taken: steps from 1, and what is not a mean', () => {
  const run = runOf(1, { total: 20, sigma: 0.43217, frames: 16 })
  assert.equal(plain(whereText(run, at({ step: 1 }))), 'step 2 of 20 · σ 0.432')
  assert.equal(plain(whereText(run, at({ step: 1, block: 2, branch: 'uncond', frame: 3 }))),
    'step 2 of 20 · σ 0.432 · block 3 (single 0) · negative · frame 4 of 16')
  assert.equal(whereText(run, at({ step: MEAN, block: 0 })), 'mean of 1 step · block 1 (double 0)')
  assert.equal(whereText(runOf(0, { sigma: null }), at()), 'step 1 of 4')
})

test('what it cost: the tokens of what is shown, FLOPs and seconds of the step', () => {
  const run = runOf(0, { kept: { cond: [255, 102, 51], uncond: [255, 102, 51] } })
  assert.equal(plain(costText(run, at())), 'tokens 40 % · FLOPs 50 %')
  assert.equal(plain(costText(run, at({ block: 2, branch: 'cond' }))), 'tokens 20 % · step FLOPs 50 %')
  assert.equal(plain(costText(run, at({ frame: 0 }))), 'video tokens 40 % · step FLOPs 50 %')
  run.addSummary(summary('a', 'done', [0]))
  assert.equal(plain(costText(run, at())), 'tokens 40 % · FLOPs 50 % · 0.25 s')
  assert.equal(plain(costText(run, at({ step: MEAN }))), 'tokens 40 % · FLOPs 55 % · 0.25 s')
})

test('a cell of a shrunken map names the tokens it stands for', () => {
  const map = { rows: 64, cols: 64, token_rows: 256, token_cols: 256 }
  assert.equal(cellText({ row: 2, col: 63 }, map), 'rows 9–12, columns 253–256')
  assert.equal(cellText({ row: 0, col: 5 }, { ...map, token_rows: 65, token_cols: 64 }), 'row 1, column 6')
  assert.equal(cellText({ row: 63, col: 5 }, { ...map, token_rows: 65, token_cols: 64 }), 'rows 64–65, column 6')
})

test('a token is read from every map that has it', () => {
  const map = (bytes, rows = 1) => ({ rows, cols: 2, token_rows: rows, token_cols: 2, bytes })
  const a = { letter: 'A', map: map([0, 158]) }
  const b = { letter: 'B', map: map([0, 255, 102, 51], 2) }
  assert.equal(plain(tokenText({ row: 0, col: 1 }, [{ ...a, letter: '' }])), '62 % · row 1, column 2')
  assert.equal(plain(tokenText({ row: 0, col: 1 }, [a, b])), 'A 62 % · B 100 % · row 1, column 2')
  assert.equal(plain(tokenText({ row: 1, col: 1 }, [a, b])), 'B 20 % · row 2, column 2')
  assert.equal(tokenText({ row: 7, col: 1 }, [a, b]), '')
  assert.equal(tokenText({ row: 0, col: 0 }, [{ letter: '', map: null }]), '')
})

test('an empty map says why it is empty', () => {
  const pane = (run, more = {}) => ({ run, at: null, error: '', later: false, ...more })
  assert.match(emptyText(pane(new Run())), /^No map yet/)
  assert.match(emptyText(pane(new Run('a'))), /first step/)
  assert.match(emptyText(pane(new Run('a', status('a', 'failed')))), /see below/)
  assert.match(emptyText(pane(new Run('a', status('a', 'ready')))), /see below/)
  assert.match(emptyText(pane(new Run('a'), { at: at(), later: true })), /when the run has ended/)
  assert.match(emptyText(pane(new Run('a'), { at: at(), error: 'it left the store' })), /it left the store/)
  assert.equal(emptyText(pane(new Run('a'), { at: at() })), '')
})

test('two runs are told apart by letter and by what was asked', () => {
  const run = runOf(0)
  run.status = status('a', 'done', { asked: 0.6 })
  assert.equal(plain(compareText({ letter: 'A', run, at: at() })), 'A: asked 60 % · tokens 40 % · FLOPs 50 %')
  assert.match(compareText({ letter: 'B', run: new Run('b'), at: null }), /^B: The map fills/)
})

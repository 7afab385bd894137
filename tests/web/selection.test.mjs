import assert from 'node:assert/strict'
import { test } from 'node:test'

import { Run } from '../../web/run.js'
import { DEFAULT, held, MEAN, moveByKey, placeAt, resolve } from '../../web/selection.js'
import { step } from './fixtures.mjs'

function runWith(...steps) {
  const run = new Run('a')
  for (const i of steps) run.addStep(step(i, { total: 8 }))
  return run
}

test('the default follows the newest step, all else together', () => {
  const run = runWith(0, 1)
  assert.deepEqual(resolve(DEFAULT, run), { step: 1, block: MEAN, branch: null, frame: null })
  run.addStep(step(5))
  assert.equal(resolve(DEFAULT, run).step, 5)
  assert.equal(resolve(DEFAULT, new Run('b')), null)
})

test('what a run has not is shown as the nearest it has, or as the mean', () => {
  const run = runWith(1, 3)
  const chosen = (part) => resolve({ ...DEFAULT, ...part }, run)
  assert.deepEqual([0, 2, 3, 7].map((i) => chosen({ step: i }).step), [1, 1, 3, 3])
  assert.equal(chosen({ step: MEAN }).step, MEAN)
  assert.deepEqual([chosen({ block: 2 }).block, chosen({ block: 3 }).block], [2, MEAN])
  assert.equal(chosen({ branch: 'cond' }).branch, 'cond')
  assert.equal(chosen({ frame: 1 }).frame, null) // a picture
  run.frames = 4
  assert.deepEqual([null, 0, 3, 9].map((frame) => chosen({ frame }).frame), [null, 0, 3, 3])
  run.branches = ['cond'] // cfg 1: one branch is the mean of all
  assert.equal(chosen({ branch: 'cond' }).branch, null)
})

test('the last step follows a run that goes on', () => {
  const run = runWith(0, 1, 2)
  assert.deepEqual([0, 1, 2, 7, MEAN].map((i) => held(i, run)), [0, 1, null, null, MEAN])
})

test('keys walk over steps and blocks, the means before the first', () => {
  const run = runWith(0, 1, 2, 3)
  const go = (step, block, key) => Object.values(moveByKey({ step, block }, key, run))
  assert.deepEqual(go(0, 0, 'ArrowRight'), [1, 0])
  assert.deepEqual(go(3, 0, 'ArrowRight'), [3, 0])
  assert.deepEqual(go(0, 0, 'ArrowLeft'), [MEAN, 0])
  assert.deepEqual(go(MEAN, 0, 'ArrowLeft'), [MEAN, 0])
  assert.deepEqual(go(MEAN, 0, 'ArrowRight'), [0, 0])
  assert.deepEqual(go(2, MEAN, 'ArrowDown'), [2, 0])
  assert.deepEqual(go(2, 0, 'ArrowUp'), [2, MEAN])
  assert.deepEqual(go(2, 2, 'ArrowDown'), [2, 2])
  assert.deepEqual(go(2, 1, 'Home'), [MEAN, 1])
  assert.deepEqual(go(0, 1, 'End'), [3, 1])
  assert.equal(moveByKey({ step: 0, block: 0 }, 'Delete', run), undefined)
})

test('keys jump over steps that were not sent', () => {
  const run = runWith(1, 4)
  const go = (step, key) => moveByKey({ step, block: MEAN }, key, run).step
  assert.deepEqual([go(1, 'ArrowRight'), go(4, 'ArrowLeft'), go(1, 'ArrowLeft'), go(MEAN, 'ArrowRight')], [4, 1, MEAN, 1])
})

test('a point falls into one of equal parts; before them are the means, behind them is the last', () => {
  assert.deepEqual([99, 100, 149, 150, 199.9, 300].map((x) => placeAt(x, 100, 100, 2)), [MEAN, 0, 0, 1, 1, 1])
})

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { Run } from '../../web/run.js'
import { MEAN } from '../../web/selection.js'
import { base64, step, status, summary } from './fixtures.mjs'

const near = (actual, expected) => assert.ok(Math.abs(actual - expected) < 1e-9, `${actual} is not ${expected}`)

test('a step tells of every block, branch and width, and brings the mean map', () => {
  const run = new Run('a')
  run.addStep(step(1, { kept: { cond: [255, 51, 51], uncond: [51, 51, 51] }, heads: [255, 0, 0], computed: 0.333 }))
  assert.deepEqual([run.count, run.latest, run.total, run.branches], [1, 1, 4, ['cond', 'uncond']])
  assert.equal(run.keptAt(1, 0, 'cond'), 1)
  near(run.keptAt(1, 0, null), 0.6)
  near(run.keptAt(1, MEAN, 'uncond'), 0.2)
  assert.equal(run.keptAt(1, MEAN, null), 0.333) // as the server counted it, not as the bytes round it
  near(run.widthAt('heads', 1, MEAN), 1 / 3)
  assert.equal(run.widthAt('groups', 1, 0), null)
  assert.deepEqual([...run.liveMap({ step: 1, block: MEAN, branch: null, frame: null }).bytes], [0, 255, 51, 102])
  for (const other of [{ step: 0 }, { step: MEAN }, { block: 0 }, { branch: 'cond' }, { frame: 0 }])
    assert.equal(run.liveMap({ step: 1, block: MEAN, branch: null, frame: null, ...other }), null)
})

test('a step of a video brings the map of each frame, where they are not too many', () => {
  const run = new Run('a')
  run.addStep(step(0, { frames: 2, bytes: [0, 255, 51, 102], each: base64([0, 255, 51, 0, 0, 255, 51, 204]) }))
  run.addStep(step(1, { frames: 2, each: null }))
  const bytes = (part) => run.liveMap({ step: 0, block: MEAN, branch: null, ...part })?.bytes
  assert.deepEqual([null, 0, 1].map((frame) => [...bytes({ frame })]), [[0, 255, 51, 102], [0, 255, 51, 0], [0, 255, 51, 204]])
  assert.equal(run.liveMap({ step: 0, block: MEAN, branch: null, frame: 1 }).cols, 2)
  for (const other of [{ frame: 0, step: 1 }, { frame: 0, block: 0 }, { frame: 0, branch: 'cond' }]) assert.equal(bytes(other), undefined)
})

test('each frame has its picture; of a list of runs the last are this one’s', () => {
  const run = new Run('a')
  assert.equal(run.pictureOf(null), null)
  run.pictures = ['one', 'two']
  assert.equal(run.pictureOf(null), 'two')
  run.addStep(step(0, { frames: 2 }))
  run.pictures = ['a 1', 'a 2', 'b 1', 'b 2']
  assert.deepEqual([null, 0, 1].map((frame) => run.pictureOf(frame)), ['b 1', 'b 1', 'b 2'])
  run.pictures = ['preview'] // of the first frame
  assert.deepEqual([null, 0, 1].map((frame) => run.pictureOf(frame)), ['preview', 'preview', null])
  run.pictures = ['1', 'between', '2']
  assert.equal(run.pictureOf(0), null)
})

test('a mean is over the steps that are known, and over the branches that a step has', () => {
  const run = new Run('a')
  run.addStep(step(0, { kept: { cond: [255, 255, 255], uncond: [255, 255, 255] }, flops: 1, computed: 1 }))
  run.addStep(step(2, { kept: { cond: [51, 51, 51] }, flops: 0.2, computed: 0.2 })) // guidance was off; step 1 was dropped
  near(run.keptAt(MEAN, 0, null), 0.6)
  near(run.keptAt(MEAN, 0, 'uncond'), 1)
  near(run.keptAt(MEAN, MEAN, null), 0.6)
  near(run.flopsAt(MEAN), 0.6)
  assert.equal(run.keptAt(2, 0, 'uncond'), null)
  assert.equal(run.keptAt(1, 0, null), null)
  assert.equal(run.secondsAt(MEAN), null)
})

test('a summary fills what was not sent live, and brings seconds; what was spent in all is what the server counted', () => {
  const run = new Run('a')
  run.addStep(step(3, { total: 6 }))
  run.addSummary(summary('a', 'done', [0, 1, 3], { groups: [51, 51, 51] }))
  assert.deepEqual([run.count, run.total, run.ended], [3, 4, true])
  assert.equal(run.secondsAt(1), 0.25)
  near(run.keptAt(1, 2, 'cond'), 0.2)
  near(run.widthAt('groups', 3, 1), 0.2)
  assert.equal(run.steps[2], undefined) // it was never recorded
  assert.equal(run.flopsAt(MEAN), 0.55)
  assert.deepEqual([run.nearestStep(2), run.nearestStep(99)], [1, 3])
  assert.ok(run.liveMap({ step: 3, block: MEAN, branch: null, frame: null }))
})

test('a branch that a step did not run is unknown there, and the prompt of the run is known after a reload', () => {
  const run = new Run('a')
  const told = summary('a', 'done', [0, 1], { prompt: 'p' })
  told.steps[1].branches = ['cond'] // guidance was off
  run.addSummary(told)
  assert.equal(run.prompt, 'p')
  assert.equal(run.keptAt(1, 0, 'uncond'), null)
  near(run.keptAt(1, 0, null), 1)
})

test('a run that was interrupted or failed keeps the number of steps it was meant to have', () => {
  for (const state of ['interrupted', 'failed']) {
    const run = new Run('a')
    run.addStep(step(0, { total: 20 }))
    run.addSummary(summary('a', state, [0]))
    assert.deepEqual([run.ended, run.total], [true, 20])
  }
})

test('a run that sampled nothing has no steps, whatever its summary says', () => {
  const run = new Run('a')
  run.addSummary(summary('a', 'done', []))
  assert.deepEqual([run.count, run.total, run.ended], [0, 0, true])
})

test('bytes that cannot be read, or do not fit, are unknown and not shown askew', () => {
  const run = new Run('a')
  run.addStep({ ...step(0, { bytes: [1, 2, 3] }), kept: { cond: '%%%', uncond: '%%%' } })
  assert.equal(run.keptAt(0, 0, null), null)
  assert.equal(run.liveMap({ step: 0, block: MEAN, branch: null, frame: null }), null)
  run.addSummary({ ...summary('a', 'done', [0, 1]), kept: { cond: 'AAAA', uncond: 'AAAA' } })
  assert.equal(run.keptAt(1, 0, 'cond'), null)
})

test('before its first step a run has ended only when it says so', () => {
  for (const [state, ended] of [['ready', false], ['refused', false], ['running', false], ['failed', true]])
    assert.equal(new Run('a', status('a', state)).ended, ended)
})

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { cividis } from '../../web/heatmap.js'
import { Run } from '../../web/run.js'
import { barsPath, outlinePath, paintScore, rulesPath, ticksPath } from '../../web/score.js'
import { step } from './fixtures.mjs'

const colour = (byte) => [...cividis(byte / 255), 255]
const CLEAR = [0, 0, 0, 0]

test('steps go across, blocks down; what is not known stays clear', () => {
  const run = new Run('a')
  run.addStep(step(0, { total: 3, blocks: ['b0', 'b1'], kept: { cond: [255, 51], uncond: [51, 51] }, computed: 0.4 }))
  run.addStep(step(2, { total: 3, blocks: ['b0', 'b1'], kept: { cond: [0, 255], uncond: [0, 255] }, computed: 0.5 }))
  const { body, all, mean, corner } = paintScore(run, null)
  assert.deepEqual([body.width, body.height, all.width, all.height, mean.width, mean.height], [3, 2, 3, 1, 1, 2])
  assert.deepEqual(body.pixels, [...colour(153), ...CLEAR, ...colour(0), ...colour(51), ...CLEAR, ...colour(255)])
  assert.deepEqual(all.pixels, [...colour(102), ...CLEAR, ...colour(128)])
  assert.deepEqual(corner.pixels, colour(115)) // the mean of 40 % and 50 %
  assert.deepEqual(paintScore(run, 'uncond').body.pixels.slice(0, 4), colour(51))
})

test('a long run of a large model is painted in no time', () => {
  const run = new Run('a')
  const row = new Array(57).fill(128)
  for (let i = 0; i < 50; i++)
    run.addStep(step(i, { total: 50, blocks: row.map((_, b) => `b${b}`), kept: { cond: row, uncond: row } }))
  paintScore(run, null)
  const start = performance.now()
  paintScore(run, null)
  assert.ok(performance.now() - start < 200) // some 10 ms on an idle machine
})

test('bars stand at their step, leave holes, and show a free step as a sliver', () => {
  assert.equal(barsPath([1, null, 0.25, 0], 4), 'M0.08 1V0H0.92V1zM2.08 1V0.75H2.92V1zM3.08 1V0.98H3.92V1z')
  assert.equal(barsPath([1], 100), 'M0 1V0H1V1z')
})

test('what a bar leaves free is ruled; a full bar and a hole are not', () => {
  assert.equal(rulesPath([1, null, 0.65], 3), 'M2.08 0.02H2.92M2.08 0.2H2.92')
})

test('another run is a line along its tops, stretched to the same width', () => {
  assert.equal(outlinePath([1, 0.5], 4), 'M0 0H2M2 0.5H4')
  assert.equal(outlinePath([null, 0.5], 2), 'M1 0.5H2')
})

test('a computed head is a tall tick, a skipped one a short tick', () => {
  assert.equal(ticksPath('10'), 'M0.15 1V0H0.85V1zM1.15 1V0.7H1.85V1z')
})

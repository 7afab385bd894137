import assert from 'node:assert/strict'
import { test } from 'node:test'

import { duration, progressText, ticks, TrainingView } from '../../web/view/training.js'
import { fakeDocument } from './fake_dom.mjs'
import { plain } from './fixtures.mjs'

const event = (more = {}) => ({
  state: 'training', done: 3, total: 9, seconds: 2.04, left: 12.2, lines: [],
  budgets: [0.5, 0.75, 0.9], steps: [1, 2, 3], errors: [[-10, null, null], [-12, -18, null], [-14, -20, null]], ...more
})

test('before a training it says what the node does, and draws nothing', () => {
  const view = new TrainingView(fakeDocument)
  assert.match(view.progress.textContent, /Not trained yet/)
  assert.equal(view.bar.hidden, true)
  assert.equal(view.root.findAll('polyline').length, 0)
})

test('a line for each budget that was trained, falling as its error does', () => {
  const view = new TrainingView(fakeDocument)
  view.show(event())
  const lines = view.root.findAll('polyline')
  assert.equal(lines.length, 2)
  const [first, second] = lines.map(({ attributes }) => attributes.points.split(' ').map((point) => point.split(',').map(Number)))
  assert.deepEqual([first.length, second.length], [3, 2])
  assert.ok(first[0][1] < first[1][1] && first[1][1] < first[2][1], 'a lower error is lower on the page')
  assert.ok(first[1][0] === second[0][0] && second[0][1] > first[1][1], 'the same step, a lower error')
  assert.notEqual(lines[0].attributes.stroke, lines[1].attributes.stroke)
  assert.deepEqual(view.legend.children.map((entry) => plain(entry.textContent)), ['budget 50 %: -14.0 dB', 'budget 75 %: -20.0 dB'])
  assert.equal(view.bar.attributes.value, String(1 / 3))
})

test('every event draws all of it anew', () => {
  const view = new TrainingView(fakeDocument)
  view.show(event())
  view.show(event({ state: 'interrupted', errors: [[null, null, null], [null, null, null], [null, null, null]], lines: ['Queue it again to go on.'] }))
  assert.equal(view.root.findAll('polyline').length, 0)
  assert.equal(view.chart.hidden, true)
  assert.equal(view.lines.textContent, 'Queue it again to go on.')
  assert.equal(view.root.dataset.state, 'interrupted')
})

test('what is said of the progress', () => {
  assert.equal(progressText(event()), 'Training: step 3 of 9 · 2.0 s each · 12 s left')
  assert.equal(progressText(event({ state: 'recording', seconds: null, left: null })), 'Dense evaluations to learn from: 3 of 9')
  assert.equal(progressText(event({ state: 'done' })), 'Trained for 3 steps')
  assert.match(progressText(event({ state: 'finishing' })), /^Trained for 3 steps; measuring/)
  assert.equal(progressText({ state: 'failed', lines: ['why'] }), 'failed')
})

test('times fit on a line', () => {
  assert.deepEqual([0.2, 80, 600, 3 * 3600].map(duration), ['1 s', '80 s', '10 min', '3.0 h'])
})

test('ticks are round numbers', () => {
  assert.deepEqual(ticks(-21.3, -9.7), [-20, -15, -10])
  assert.deepEqual(ticks(-2.1, 0.1), [-2, -1, 0].map((tick) => tick || 0))
})

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { cividis } from '../../web/heatmap.js'
import { RunRecord } from '../../web/records.js'
import { MapView } from '../../web/view.js'
import { fakeDocument } from './fake_dom.mjs'

/** A view, the record it shows, and `paint()`, which is the browser's next animation frame. */
function setUp() {
  const waiting = []
  const view = new MapView(fakeDocument, (draw) => waiting.push(draw))
  const record = new RunRecord('w', '7')
  const paint = () => waiting.splice(0).forEach((draw) => draw())
  const show = () => { view.show(record); paint() }
  const part = (name) => view.root.find(name)
  return { view, record, waiting, paint, show, part }
}

function step(step, { run = 'a', bytes = [0, 255, 51, 102], rows = 2, cols = 2, total = 4 } = {}) {
  return {
    run, step, rows, cols, token_rows: rows, token_cols: cols, total, sigma: 1 - step / total, computed: 0.4, flops: 0.5,
    grid: Buffer.from(bytes).toString('base64')
  }
}

const text = (element) => element.textContent.replaceAll('\u00a0', ' ')

test('before any run it says so, and shows neither map nor scale', () => {
  const { part } = setUp()
  assert.match(text(part('dydit-empty')), /No map yet/)
  for (const name of ['dydit-cells', 'dydit-legend', 'dydit-timeline']) assert.equal(part(name).hidden, true)
})

test('a step is painted on the fixed scale, and told in words', () => {
  const { record, show, part } = setUp()
  record.addStep(step(0))
  show()
  assert.deepEqual(part('canvas').pixels.slice(0, 8), [...cividis(0), 255, ...cividis(1), 255])
  assert.match(text(part('dydit-cost')), /40 % of tokens · 50 % of FLOPs/)
  assert.match(part('dydit-cells').attributes['aria-label'], /2 rows by 2 columns, step 1 of 4/)
  assert.match(part('input').attributes['aria-valuetext'], /^step 1 of 4/)
})

test('a burst of steps is painted once', () => {
  const { view, record, waiting, paint, part } = setUp()
  for (let i = 0; i < 4; i++) { record.addStep(step(i)); view.show(record) }
  assert.equal(waiting.length, 1)
  paint()
  assert.equal(part('canvas').draws, 1)
  assert.equal(view.root.dataset.step, 3)
})

test('it follows the run until one scrubs back, and again from the last step on', () => {
  const { view, record, show, part } = setUp()
  const range = part('input')
  const arrive = (i) => { record.addStep(step(i)); show() }
  arrive(0); arrive(1)
  assert.equal(view.root.dataset.step, 1)
  range.value = 0; range.fire('input')
  arrive(2)
  assert.deepEqual([view.root.dataset.step, view.root.dataset.follow], [0, false])
  range.value = 3; range.fire('input') // beyond what has arrived: there is no such step yet
  assert.equal(range.value, 2)
  arrive(3)
  assert.equal(view.root.dataset.step, 3)
})

test('a new run is followed from its start, whatever was scrubbed to', () => {
  const { view, record, show, part } = setUp()
  record.addStep(step(0)); record.addStep(step(1)); show()
  part('input').value = 0; part('input').fire('input')
  record.addStep(step(0, { run: 'b' })); record.addStep(step(1, { run: 'b' })); show()
  assert.deepEqual([view.root.dataset.run, view.root.dataset.step], ['b', 1])
})

test('pointing reads a token, and a click keeps it while the steps change', () => {
  const { record, show, part } = setUp()
  record.addStep(step(0)); show()
  part('dydit-cells').fire('pointermove', { clientX: 75, clientY: 25 })
  assert.equal(text(part('dydit-token')), 'row 1, column 2: computed in 100 % of blocks')
  part('dydit-cells').fire('pointerleave')
  assert.match(text(part('dydit-token')), /point at a token/)
  part('dydit-cells').fire('click', { clientX: 25, clientY: 75 })
  part('dydit-cells').fire('pointerleave')
  assert.equal(text(part('dydit-token')), 'row 2, column 1: computed in 20 % of blocks')
  record.addStep(step(1, { bytes: [0, 0, 255, 0] })); show()
  assert.equal(text(part('dydit-token')), 'row 2, column 1: computed in 100 % of blocks')
})

test('arrow keys read tokens aloud; a step that arrives does not', () => {
  const { record, show, part } = setUp()
  record.addStep(step(0)); show()
  const event = part('dydit-cells').fire('keydown', { key: 'ArrowDown' })
  assert.equal(event.prevented, true)
  assert.equal(part('dydit-token').attributes['aria-live'], 'polite')
  part('dydit-cells').fire('keydown', { key: 'ArrowDown' })
  assert.match(text(part('dydit-token')), /^row 2, column 1/)
  record.addStep(step(1)); show()
  assert.equal(part('dydit-token').attributes['aria-live'], 'off')
  part('dydit-cells').fire('keydown', { key: 'Escape' })
  assert.match(text(part('dydit-token')), /point at a token/)
})

test('keys typed on the map do not reach the graph, shortcuts do', () => {
  const { view } = setUp()
  assert.equal(view.root.fire('keydown', { key: 'Delete' }).stopped, true)
  assert.equal(view.root.fire('keydown', { key: 'z', ctrlKey: true }).stopped, false)
})

test('the status shows the lines of the server, and is not rewritten while it stays the same', () => {
  const { record, show, part } = setUp()
  record.addStatus({ run: 'a', state: 'running', lines: ['asked 50 %', 'floor 29 %'] })
  show()
  const [first] = part('dydit-status').children
  assert.equal(text(part('dydit-status')), 'runningasked 50 %floor 29 %')
  record.addStep(step(0)); show()
  assert.equal(part('dydit-status').children[0], first)
})

test('a run whose map is gone, and a map that cannot be read, are told in words', () => {
  const { record, show, part } = setUp()
  record.addStatus({ run: 'a', state: 'done', lines: [] })
  record.notice = 'it left the store'
  show()
  assert.equal(text(part('dydit-empty')), 'it left the store')
  record.addStep(step(0, { bytes: [1, 2, 3] })); show()
  assert.match(text(part('dydit-empty')), /could not be read/)
  assert.equal(part('dydit-cells').hidden, true)
  part('dydit-cells').fire('keydown', { key: 'ArrowDown' }) // must not throw
})

test('a cursor outside a smaller map reads nothing', () => {
  const { record, show, part } = setUp()
  record.addStep(step(0)); show()
  part('dydit-cells').fire('click', { clientX: 75, clientY: 75 })
  record.addStep(step(0, { run: 'b', rows: 1, cols: 1, bytes: [9] })); show()
  assert.match(text(part('dydit-token')), /point at a token/)
})

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { cividis } from '../../web/heatmap.js'
import { mapAnswer, plain, status, step, summary } from './fixtures.mjs'
import { afterRun, button, choose, setUp, text } from './set_up.mjs'

test('before any run it says so, and shows no control of a map', () => {
  const { part } = setUp()
  assert.match(text(part('dydit-empty')), /No map yet/)
  for (const name of ['dydit-cells', 'dydit-legend', 'dydit-score', 'dydit-choices', 'dydit-tools', 'dydit-widths', 'dydit-numbers'])
    assert.equal(part(name).hidden, true, name)
})

test('a step is painted on the fixed scale, and told in words, without a request', async () => {
  const { record, show, arrive, part, asked } = setUp()
  record.addStep(step(0))
  show()
  await arrive()
  assert.deepEqual(part('dydit-cells').find('canvas').pixels.slice(0, 8), [...cividis(0), 255, ...cividis(1), 255])
  assert.match(text(part('dydit-numbers')), /^step 1 of 4.*tokens 40 % · FLOPs 50 %/)
  assert.match(plain(part('dydit-cells').attributes['aria-label']), /2 rows by 2 columns, step 1 of 4.*tokens 40 %/)
  assert.match(part('dydit-slider').attributes['aria-valuetext'], /^step 1 of 4/)
  assert.deepEqual(asked, [])
})

test('a burst of steps is painted once', () => {
  const { view, record, drawing, paint, part, data } = setUp()
  for (let i = 0; i < 4; i++) { record.addStep(step(i)); view.show(record) }
  assert.equal(drawing.length, 1)
  paint()
  assert.equal(part('canvas').draws, 1)
  assert.deepEqual([data.step, data.steps], [3, 4])
})

test('the matrix grows while the run goes on', () => {
  const { record, show, part } = setUp()
  for (let i = 0; i < 2; i++) {
    record.addStep(step(i)); show()
    const { width, height, pixels } = part('dydit-body')
    assert.deepEqual([width, height], [4, 3])
    assert.deepEqual([0, 1, 2, 3].map((x) => pixels[4 * x + 3]), [255, i ? 255 : 0, 0, 0]) // opaque where something is known
  }
})

test('it follows the run until one looks back, and again from the last step on', () => {
  const { record, show, part, data } = setUp()
  const slider = part('dydit-slider')
  const arrives = (i) => { record.addStep(step(i)); show() }
  arrives(0); arrives(1)
  assert.equal(data.step, 1)
  slider.fire('pointerdown', { clientX: 10 })
  arrives(2)
  assert.deepEqual([data.step, data.follow], [0, false])
  slider.fire('pointermove', { clientX: 95, buttons: 1 }) // beyond what has arrived: there is no such step yet
  assert.deepEqual([data.step, data.follow], [2, true])
  slider.fire('pointermove', { clientX: 10, buttons: 0 }) // let go of
  arrives(3)
  assert.equal(data.step, 3)
})

test('a new run is followed from its start, whatever was looked at', () => {
  const { record, show, part, data } = setUp()
  record.addStep(step(0)); record.addStep(step(1)); show()
  part('dydit-slider').fire('pointerdown', { clientX: 10 })
  record.addStep(step(0, { run: 'b' })); record.addStep(step(1, { run: 'b' })); show()
  assert.deepEqual([data.run, data.step], ['b', 1])
})

test('the steps by keyboard: to the mean of all and back, as a slider', async () => {
  const { part, press, data, asked, arrive } = afterRun()
  const slider = part('dydit-slider')
  const after = (key) => { press(slider, key); return data.step }
  assert.deepEqual(['ArrowLeft', 'ArrowDown', 'ArrowUp', 'Home', 'ArrowLeft'].map(after), [2, 1, 2, 'mean', 'mean'])
  assert.deepEqual(['min', 'now', 'max'].map((name) => slider.attributes[`aria-value${name}`]), ['0', '0', '4'])
  assert.match(plain(slider.attributes['aria-valuetext']), /^mean of 4 steps, tokens 40 % · FLOPs 50 %/)
  await arrive()
  assert.deepEqual(asked, ['/dydit/trace/a/mean/mean'])
  assert.deepEqual(['ArrowRight', 'End'].map(after), [0, 3])
  assert.equal(data.follow, true)
  assert.equal(press(slider, 'Delete').prevented, false)
})

test('a click in the matrix opens that step and block, a drag the ones on its way', async () => {
  const { part, data, asked, arrive } = afterRun()
  const matrix = part('dydit-matrix')
  part('dydit-body').box = { left: 20, top: 20, width: 80, height: 60 }
  part('dydit-slider').findAll('dydit-steps')[1].box = { left: 20, top: 0, width: 80, height: 10 }
  const at = (type, clientX, clientY) => { matrix.fire(type, { clientX, clientY, buttons: 1 }); return [data.step, data.block] }
  assert.deepEqual(at('pointerdown', 25, 45), [0, 1])
  await arrive()
  assert.deepEqual(at('pointermove', 50, 70), [1, 2])
  assert.deepEqual(at('pointermove', 10, 70), ['mean', 2])
  assert.deepEqual(at('pointermove', 50, 10), [1, 'mean'])
  assert.deepEqual(at('pointermove', 10, 10), ['mean', 'mean'])
  assert.deepEqual(at('pointermove', 999, 999), [3, 2])
  await arrive(); await arrive()
  assert.deepEqual(asked, ['/dydit/trace/a/0/1', '/dydit/trace/a/1/2', '/dydit/trace/a/3/2']) // none of those passed meanwhile
  assert.equal(data.map, 'shown')
  assert.equal(matrix.fire('pointerdown', { button: 1, buttons: 4 }).stopped, false) // the middle button pans the graph
})

test('the matrix by keyboard, spoken; Escape shows all again', () => {
  const { view, part, press, data } = afterRun()
  const matrix = part('dydit-matrix')
  press(matrix, 'ArrowDown'); press(matrix, 'ArrowDown'); press(matrix, 'ArrowLeft')
  assert.deepEqual([data.step, data.block], [2, 1])
  assert.match(text(view.said), /^step 3 of 4 · σ 0.500 · block 2 \(double 1\), tokens 40 % · step FLOPs 50 %$/)
  press(matrix, 'Escape')
  assert.deepEqual([data.step, data.block, data.follow], [3, 'mean', true])
})

test('the block by name, the prompt by switch', async () => {
  const { part, data, asked, arrive } = afterRun({ run: { kept: { cond: [255, 255, 255], uncond: [51, 51, 51] } } })
  const block = part('select')
  assert.deepEqual(block.children.map((child) => child.textContent), ['all blocks, mean', 'block 1 (double 0)', 'block 2 (double 1)', 'block 3 (single 0)'])
  block.value = '2'
  block.fire('change')
  choose(part('dydit-choices'), 'uncond')
  assert.deepEqual([data.block, data.branch], [2, 'uncond'])
  assert.match(text(part('dydit-numbers')), /block 3 \(single 0\) · negative.*tokens 20 %/)
  await arrive()
  assert.equal(asked.at(-1), '/dydit/trace/a/3/2?branch=uncond')
  block.value = 'mean'
  block.fire('change')
  choose(part('dydit-choices'), 'all')
  assert.deepEqual([data.block, data.branch], ['mean', 'mean'])
})

test('with one branch there is no switch; with one frame no frames', () => {
  const one = afterRun({ run: { kept: { cond: [255, 102, 51] } } }).part('dydit-choices')
  assert.equal(one.find('dydit-choice').hidden, true)
  assert.equal(afterRun().part('dydit-choices').find('dydit-choice').hidden, false)
  assert.equal(afterRun().part('dydit-frames').hidden, true)
})

test('the frames of a video, and their mean', async () => {
  const { part, data, asked, arrive } = afterRun({ run: { frames: 16 } })
  const row = part('dydit-frames')
  const range = row.find('input')
  const said = () => text(row.find('dydit-number'))
  assert.deepEqual([row.hidden, range.max, range.value, said()], [false, 15, -1, 'mean of 16 frames'])
  range.value = 4
  range.fire('input')
  assert.deepEqual([data.frame, said(), range.attributes['aria-valuetext']], [4, 'frame 5 of 16', 'frame 5 of 16'])
  await arrive()
  assert.equal(asked.at(-1), '/dydit/trace/a/3/mean?frame=4')
})

/** A video's run with its frames' button and slider, and the frames seen while it plays on for some ticks of the clock. */
function playing(mock, options = {}) {
  mock.timers.enable({ apis: ['setTimeout'] })
  const all = afterRun({ run: { frames: 3 }, ...options })
  const [play, range] = ['button', 'input'].map((name) => all.part('dydit-frames').find(name))
  const seen = async (times) => {
    const frames = []
    for (let i = 0; i < times; i++) {
      await all.arrive()
      mock.timers.tick(160)
      frames.push(all.data.frame)
    }
    return frames
  }
  return { ...all, play, range, seen, name: () => play.attributes['aria-label'] }
}

test('frames are played one after the other, until one stops them or takes the slider', async ({ mock }) => {
  const { play, range, seen, name, data } = playing(mock)
  play.fire('click')
  assert.deepEqual([data.frame, name(), ...await seen(4)], [0, 'Stop playing', 1, 2, 0, 1])
  play.fire('click')
  assert.deepEqual([name(), ...await seen(2)], ['Play the frames', 1, 1])
  play.fire('click')
  range.value = -1
  range.fire('input')
  assert.deepEqual([name(), ...await seen(2)], ['Play the frames', 'mean', 'mean'])
})

test('playing waits for a map that is on its way, and ends where there is none', async ({ mock }) => {
  let gone = false
  const { play, seen, name, data, asked } = playing(mock, { reply: () => (gone ? { status: 404, body: { error: 'gone' } } : mapAnswer()) })
  play.fire('click')
  for (let i = 0; i < 5; i++) mock.timers.tick(160)
  assert.equal(data.frame, 0)
  gone = true
  assert.deepEqual(await seen(4), [1, 1, 1, 1])
  assert.equal(name(), 'Play the frames')
  assert.deepEqual(asked.map((path) => path.at(-1)), ['0', '1'])
})

test('what plays goes on with the next run', async ({ mock }) => {
  const { play, seen, name, record, show } = playing(mock)
  play.fire('click')
  record.addStep(step(0, { run: 'b', frames: 3 }))
  show()
  assert.deepEqual([name(), ...await seen(2)], ['Stop playing', 1, 2])
})

test('of two videos the longer one has the slider', () => {
  const { record, show, view, part, data } = afterRun({ run: { frames: 4 } })
  button(view, 'Pin').fire('click')
  record.addStep(step(0, { run: 'b', frames: 2 }))
  show()
  const range = part('dydit-frames').find('input')
  range.value = 3
  range.fire('input')
  assert.deepEqual([range.max, text(part('dydit-frames').find('dydit-number')), data.frame], [3, 'frame 4 of 4', 1])
})

test('playing ends with the page that it is on', async ({ mock }) => {
  const { play, part, seen, name } = playing(mock)
  play.fire('click')
  part('dydit-frames').isConnected = false
  assert.deepEqual([...await seen(3), name()], [0, 0, 0, 'Play the frames'])
})

test('heads and channels: a share for means, a tick for each where one step and block is shown', async () => {
  const { part, arrive } = afterRun({ run: { heads: [255, 51, 51], groups: [51, 51, 51] }, reply: () => mapAnswer({ heads: '1011', groups: '0010' }) })
  const widths = part('dydit-widths')
  const said = () => widths.findAll('dydit-number').map(text)
  assert.equal(widths.hidden, false)
  assert.deepEqual(said(), ['47 %', '20 %'])
  part('select').value = '0'
  part('select').fire('change')
  assert.deepEqual(said(), ['100 %', '20 %']) // known before the map is here
  await arrive()
  assert.deepEqual(said(), ['3 of 4', '1 of 4'])
  assert.equal(widths.find('svg').attributes.viewBox, '0 0 4 1')
  assert.equal(afterRun().part('dydit-widths').hidden, true)
})

test('while a map is on its way the last one stays, dimmed; while sampling, it says when it can be had', async () => {
  const { view, part, press, data, arrive, record, show } = afterRun()
  const cells = part('dydit-cells')
  press(part('dydit-matrix'), 'ArrowDown')
  assert.deepEqual([cells.hidden, cells.classes.has('is-waiting'), cells.attributes['aria-busy'], data.map], [false, true, 'true', 'none'])
  await arrive()
  assert.deepEqual([cells.classes.has('is-waiting'), data.map], [false, 'shown'])
  assert.deepEqual(cells.find('canvas').pixels.slice(0, 4), [...cividis(1), 255])
  record.addStep(step(0, { run: 'b' })); show()
  assert.deepEqual([data.run, data.map], ['b', 'none'])
  assert.match(text(view.root.find('dydit-empty')), /when the run has ended/)
})

test('a map that cannot be had says why', async () => {
  const { part, press, arrive } = afterRun({ reply: () => ({ status: 404, body: { error: 'This run is no longer kept.' } }) })
  press(part('dydit-matrix'), 'ArrowDown')
  await arrive()
  assert.match(text(part('dydit-empty')), /cannot be shown: This run is no longer kept/)
  assert.equal(part('dydit-empty').hidden, false)
})

test('pointing reads a token, and a click keeps it while the steps change', () => {
  const { record, show, part } = setUp()
  record.addStep(step(0)); show()
  const cells = part('dydit-cells')
  cells.fire('pointermove', { clientX: 75, clientY: 25 })
  assert.equal(text(part('dydit-token')), '100 % · row 1, column 2')
  cells.fire('pointerleave')
  assert.match(text(part('dydit-token')), /point at a token/)
  cells.fire('click', { clientX: 25, clientY: 75 })
  cells.fire('pointerleave')
  assert.equal(text(part('dydit-token')), '20 % · row 2, column 1')
  record.addStep(step(1, { bytes: [0, 0, 255, 0] })); show()
  assert.equal(text(part('dydit-token')), '100 % · row 2, column 1')
})

test('arrow keys read tokens aloud; a step that arrives does not', () => {
  const { view, record, show, part, press } = setUp()
  record.addStep(step(0)); show()
  assert.equal(press(part('dydit-cells'), 'ArrowDown').prevented, true)
  press(part('dydit-cells'), 'ArrowDown')
  assert.equal(text(view.said), 'row 2, column 1: computed 20 %')
  record.addStep(step(1, { bytes: [0, 0, 255, 0] })); show()
  assert.equal(text(view.said), 'row 2, column 1: computed 20 %')
  press(part('dydit-cells'), 'Escape')
  assert.match(text(part('dydit-token')), /point at a token/)
})

test('a cursor outside a smaller map reads nothing', () => {
  const { record, show, part } = setUp()
  record.addStep(step(0)); show()
  part('dydit-cells').fire('click', { clientX: 75, clientY: 75 })
  record.addStep(step(0, { run: 'b', rows: 1, cols: 1, bytes: [9] })); show()
  assert.match(text(part('dydit-token')), /point at a token/)
})

test('keys typed on the map do not reach the graph, shortcuts do', () => {
  const { view } = setUp()
  assert.equal(view.root.fire('keydown', { key: 'Delete' }).stopped, true)
  assert.equal(view.root.fire('keydown', { key: 'z', ctrlKey: true }).stopped, false)
})

test('details fold away, are remembered, and need no room then', () => {
  const { view, remembered } = afterRun()
  const open = view.minHeight
  assert.equal(view.root.classes.has('has-details'), true)
  button(view, 'Details').fire('click')
  assert.deepEqual([view.root.classes.has('has-details'), remembered.details], [false, false])
  assert.equal(button(view, 'Details').attributes['aria-expanded'], 'false')
  assert.ok(view.minHeight < open)
  assert.equal(view.root.style['min-height'], `${view.minHeight}px`)
  assert.equal(setUp({ remembered }).view.root.classes.has('has-details'), false)
})

test('the status shows the lines of the server, and is not rewritten while it stays the same', () => {
  const { record, show, part } = setUp()
  record.addStatus(status('a', 'running', { lines: ['asked 50 %', 'floor 29 %'] }))
  show()
  const [first] = part('dydit-status').children
  assert.equal(text(part('dydit-status')), 'runningasked 50 %floor 29 %')
  record.addStep(step(0)); show()
  assert.equal(part('dydit-status').children[0], first)
})

test('a run whose trace is gone is told of in words', () => {
  const { record, show, part } = setUp()
  record.addStatus(status('a', 'done', { lines: [] }))
  record.run.notice = 'it left the store'
  show()
  assert.match(text(part('dydit-empty')), /it left the store/)
  part('dydit-cells').fire('keydown', { key: 'ArrowDown' }) // must not throw
  part('dydit-matrix').fire('keydown', { key: 'ArrowDown' })
})

test('opening a long run of a large model asks for one map, and draws without one of every block', async () => {
  const { record, show, arrive, asked, data, part } = setUp()
  const blocks = Array.from({ length: 57 }, (_, i) => `single ${i}`)
  record.addStatus(status('a', 'done'))
  record.addSummary(summary('a', 'done', Array.from({ length: 50 }, (_, i) => i), { blocks, kept: { cond: new Array(57).fill(99) } }))
  show()
  await arrive()
  assert.deepEqual(asked, ['/dydit/trace/a/49/mean'])
  assert.deepEqual([data.steps, data.map], [50, 'shown'])
  assert.deepEqual([part('dydit-body').width, part('dydit-body').height], [50, 57])
})

test('a slider that was moved since the run is told, with what that run could have reached', () => {
  const { slider, record, show, part } = afterRun()
  record.addStatus(status('a', 'done', { achieved: 0.6, floor: 0.386 }))
  show()
  assert.ok(!text(part('dydit-status')).includes('slider'))
  slider.budget = 0.9
  show()
  assert.ok(text(part('dydit-status')).endsWith('The slider is at 90 % now; this run asked for 60 %. It could not have gone below 39 %.'))
})

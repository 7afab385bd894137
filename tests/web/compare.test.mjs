import assert from 'node:assert/strict'
import { test } from 'node:test'

import { plain, status, step } from './fixtures.mjs'
import { afterRun, button, choose, text } from './set_up.mjs'

test('the picture of a run lies under its map, when it has its shape', () => {
  const { view, record, show, part, remembered } = afterRun()
  const image = part('img')
  const arrives = (width, height) => { Object.assign(image, { naturalWidth: width, naturalHeight: height }).fire('load') }
  assert.equal(part('dydit-fade').hidden, true)
  record.run.pictures = ['/view?filename=x.png']
  show()
  assert.deepEqual([image.src, image.hidden], ['/view?filename=x.png', true])
  arrives(256, 256)
  assert.deepEqual([image.hidden, part('dydit-fade').hidden], [false, false])
  arrives(256, 100)
  assert.deepEqual([image.hidden, part('dydit-fade').hidden], [true, true])
  arrives(256, 256)
  const fade = part('dydit-fade').find('input')
  fade.value = '75'
  fade.fire('input')
  assert.equal(view.root.style['--dydit-picture'], 0.75)
  assert.equal(plain(fade.attributes['aria-valuetext']), 'map 25 %, picture 75 %')
  assert.equal(remembered.picture, 0.75)
  record.addStep(step(0, { run: 'b' })); show()
  assert.equal(image.hidden, true)
})

test('a preview is a picture too, until the next', () => {
  const { record, show, part } = afterRun()
  record.run.pictures = [new Blob(['x'])]
  show()
  const [first] = [part('img').src]
  assert.match(first, /^blob:/)
  record.run.pictures = [new Blob(['y'])]
  show()
  assert.notEqual(part('img').src, first)
})

/** A pinned run "a" and a later run "b" with other maps. */
function compared() {
  const all = afterRun()
  button(all.view, 'Pin').fire('click')
  for (let i = 0; i < 4; i++)
    all.record.addStep(step(i, { run: 'b', bytes: [255, 255, 255, 255], kept: { cond: [51, 51, 51] }, computed: 0.2, flops: 0.3 }))
  all.record.addStatus(status('b', 'done', { asked: 0.3, achieved: 0.3 }))
  all.show()
  return all
}

test('a pinned run waits for another', () => {
  const { view, part, data } = afterRun()
  button(view, 'Pin').fire('click')
  assert.equal(data.pinned, 'a')
  assert.match(text(part('dydit-numbers')), /A: asked 60 % · tokens 40 % · FLOPs 50 %Run again/)
  assert.equal(part('dydit-letter').textContent, 'A')
  button(view, 'Unpin').fire('click')
  assert.deepEqual([data.pinned, part('dydit-letter').textContent], ['', ''])
})

test('where a file decided, no budget is shown as asked for', () => {
  const { view, record, part, show } = afterRun()
  assert.notEqual(part('dydit-asked').style.display, 'none')
  record.addStatus(status('a', 'done', { ignored: true, achieved: 0.5 }))
  show()
  assert.equal(part('dydit-asked').style.display, 'none')
  button(view, 'Pin').fire('click')
  assert.match(text(part('dydit-numbers')), /A: tokens 40 % · FLOPs 50 %/)
})

test('two runs stand side by side, at the same step, with the numbers of both', () => {
  const { view, part, press, data } = compared()
  assert.deepEqual(view.root.findAll('dydit-pane').map((pane) => pane.hidden), [false, false])
  assert.deepEqual(view.root.findAll('dydit-letter').map(text), ['A', 'B'])
  press(part('dydit-slider'), 'ArrowLeft')
  const [a, b] = part('dydit-numbers').findAll('dydit-side').map(text)
  assert.equal(a, 'A: asked 60 % · tokens 40 % · FLOPs 50 %')
  assert.equal(b, 'B: asked 30 % · tokens 20 % · FLOPs 30 %')
  assert.equal(data.step, 2)
  part('dydit-cells').fire('pointermove', { clientX: 25, clientY: 75 })
  assert.equal(text(part('dydit-token')), 'A 20 % · B 100 % · row 2, column 1')
  assert.match(part('dydit-other').attributes.d, /^M0 0.5H1/) // the other run's FLOPs, over the bars
})

test('one can flip between two runs', () => {
  const { view, part, data } = compared()
  const shown = (side) => {
    choose(part('dydit-numbers'), side)
    return [data.run, view.root.findAll('dydit-pane').filter((pane) => !pane.hidden).length, data.side]
  }
  assert.deepEqual(shown('a'), ['a', 1, 'a'])
  assert.deepEqual(shown('b'), ['b', 1, 'b'])
  assert.deepEqual(shown('both'), ['b', 2, 'both'])
})

test('a picture that loads after its map was put away does no harm', () => {
  const { view, record, show } = compared()
  record.run.pictures = ['/view?filename=b.png']
  show()
  button(view, 'Unpin').fire('click')
  Object.assign(view.root.findAll('img')[1], { naturalWidth: 64, naturalHeight: 64 }).fire('load')
  assert.equal(view.root.findAll('dydit-pane')[1].hidden, true)
})

test('both maps of a comparison are fetched', async () => {
  const { part, press, asked, arrive } = compared()
  press(part('dydit-matrix'), 'ArrowDown')
  await arrive(); await arrive()
  assert.deepEqual(asked, ['/dydit/trace/a/3/0', '/dydit/trace/b/3/0'])
})

test('copy waits until every map that is shown is there', async () => {
  const { view, part, press, arrive } = compared()
  assert.equal(button(view, 'Copy').disabled, false)
  press(part('dydit-matrix'), 'ArrowDown')
  assert.equal(button(view, 'Copy').disabled, true)
  await arrive(); await arrive()
  assert.equal(button(view, 'Copy').disabled, false)
})

test('copy hands on one picture with maps, legend and numbers', async () => {
  const { view, shared, part, arrive } = compared()
  part('dydit-cells').fire('click', { clientX: 25, clientY: 75 })
  button(view, 'Copy').fire('click')
  await arrive()
  const [texts, images, file] = shared[0]
  assert.equal(file, 'dydit-map.png')
  assert.equal(images.length, 2)
  assert.deepEqual(texts.slice(0, 4), ['A', 'B', '0 %', '100 % computed'])
  for (const line of ['step 4 of 4 · σ 0.250', 'A: asked 60 % · tokens 40 % · FLOPs 50 %', 'B: asked 30 % · tokens 20 % · FLOPs 30 %',
    'A 20 % · B 100 % · row 2, column 1']) assert.ok(texts.includes(line), line)
  assert.equal(view.said.textContent, 'Copied')
})

test('copy takes the picture along, as far as it is faded in', async () => {
  const { view, record, show, shared, part, arrive } = afterRun({ remembered: { picture: 0.25 } })
  record.run.pictures = ['/view?filename=x.png']
  show()
  Object.assign(part('img'), { naturalWidth: 64, naturalHeight: 64 }).fire('load')
  button(view, 'Copy').fire('click')
  await arrive()
  assert.deepEqual(shared[0][1].map(({ source, alpha }) => [source.tag, alpha]), [['img', 1], ['canvas', 0.75]])
})

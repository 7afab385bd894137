import assert from 'node:assert/strict'
import { test } from 'node:test'

import {
  barsPath, cividis, cividisGradient, costText, decodeGrid, hitTest, moveCursor, paint, percent, stepText, tokenText
} from '../../web/heatmap.js'

const plain = (text) => text.replaceAll('\u00a0', ' ')
const base64 = (bytes) => Buffer.from(bytes).toString('base64')

test('cividis has its known ends and middle, and is clipped, not extrapolated', () => {
  assert.deepEqual(cividis(0), [0, 34, 78])
  assert.deepEqual(cividis(1), [254, 232, 56])
  cividis(128 / 255).forEach((channel, i) => assert.ok(Math.abs(channel - [125, 124, 120][i]) <= 4))
  assert.deepEqual(cividis(-3), cividis(0))
  assert.deepEqual(cividis(7), cividis(1))
})

test('cividis only gets brighter, so the order of values survives without colour vision', () => {
  const luminance = (share) => cividis(share).reduce((sum, channel, i) => sum + channel * [0.2126, 0.7152, 0.0722][i], 0)
  for (let byte = 1; byte < 256; byte++) assert.ok(luminance(byte / 255) > luminance((byte - 1) / 255) - 0.5)
})

test('the legend is drawn in the colours of the map', () => {
  assert.match(cividisGradient(3), /^linear-gradient\(90deg, rgb\(0 34 78\), rgb\(.*\), rgb\(254 232 56\)\)$/)
})

test('a grid decodes row by row', () => {
  const grid = base64([0, 1, 2, 253, 254, 255])
  assert.deepEqual([...decodeGrid({ grid, rows: 2, cols: 3 })], [0, 1, 2, 253, 254, 255])
})

test('a grid that does not fit its size, or is no base64, is refused and not drawn askew', () => {
  assert.equal(decodeGrid({ grid: base64([1, 2, 3]), rows: 2, cols: 2 }), null)
  assert.equal(decodeGrid({ grid: '', rows: 0, cols: 0 }), null)
  assert.equal(decodeGrid({ grid: '%%%', rows: 1, cols: 1 }), null)
})

test('pixels are opaque and take the fixed scale', () => {
  assert.deepEqual([...paint(Uint8Array.of(0, 255))], [...cividis(0), 255, ...cividis(1), 255])
})

test('only nothing reads 0 % and only everything reads 100 %', () => {
  assert.deepEqual([0, 0.001, 0.624, 0.999, 1].map(percent).map(plain), ['0 %', '1 %', '62 %', '99 %', '100 %'])
})

test('a point is found in the cell below it, also when the box is not square and does not start at 0', () => {
  const box = { left: 100, top: 50, width: 300, height: 100 }
  assert.deepEqual(hitTest(100, 50, box, 2, 3), { row: 0, col: 0 })
  assert.deepEqual(hitTest(399.9, 149.9, box, 2, 3), { row: 1, col: 2 })
  assert.deepEqual(hitTest(250, 99, box, 2, 3), { row: 0, col: 1 })
  for (const [x, y] of [[99, 60], [400, 60], [150, 49], [150, 150]]) assert.equal(hitTest(x, y, box, 2, 3), null)
})

test('arrow keys start in the middle, stop at the border, and leave other keys alone', () => {
  assert.deepEqual(moveCursor(null, 'ArrowUp', 16, 16), { row: 7, col: 7 })
  assert.deepEqual(moveCursor({ row: 0, col: 1 }, 'ArrowUp', 4, 4), { row: 0, col: 1 })
  assert.deepEqual(moveCursor({ row: 0, col: 1 }, 'ArrowRight', 4, 4), { row: 0, col: 2 })
  assert.deepEqual(moveCursor({ row: 3, col: 3 }, 'ArrowDown', 4, 4), { row: 3, col: 3 })
  assert.equal(moveCursor({ row: 1, col: 1 }, 'Escape', 4, 4), null)
  assert.equal(moveCursor({ row: 1, col: 1 }, 'a', 4, 4), undefined)
})

test('texts count rows, columns and steps from 1', () => {
  const bytes = new Uint8Array(16 * 16)
  bytes[2 * 16 + 6] = 158
  assert.equal(plain(tokenText({ row: 2, col: 6 }, bytes, { rows: 16, cols: 16, token_rows: 16, token_cols: 16 })), 'row 3, column 7: computed in 62 % of blocks')
  const frame = { step: 11, sigma: 0.43217, computed: 0.62, flops: 0.51 }
  assert.equal(plain(stepText(frame, 20)), 'step 12 of 20 · σ 0.432')
  assert.equal(plain(stepText({ ...frame, sigma: null }, 20)), 'step 12 of 20')
  assert.equal(plain(costText(frame)), '62 % of tokens · 51 % of FLOPs')
})

test('a cell of a shrunken map names the tokens it stands for, whatever the sizes', () => {
  const bytes = new Uint8Array(64 * 64).fill(255)
  const place = (row, col, token_rows, token_cols) =>
    tokenText({ row, col }, bytes, { rows: 64, cols: 64, token_rows, token_cols }).split(':')[0]
  assert.equal(place(2, 63, 256, 256), 'rows 9–12, columns 253–256')
  assert.equal(place(0, 5, 65, 64), 'row 1, column 6')
  assert.equal(place(63, 5, 65, 64), 'rows 64–65, column 6')
  const covered = Array.from({ length: 64 }, (_, row) => place(row, 0, 90, 64).match(/\d+/g).slice(0, -1).map(Number))
  assert.equal(covered[0][0], 1)
  assert.equal(covered.at(-1).at(-1), 90)
  for (let i = 1; i < 64; i++) assert.equal(covered[i][0], covered[i - 1].at(-1) + 1) // none missed, none twice
})

test('bars stand at their step, leave holes, and show a free step as a sliver', () => {
  const frames = []
  frames[0] = { step: 0, flops: 1 }
  frames[2] = { step: 2, flops: 0.25 }
  frames[3] = { step: 3, flops: 0 }
  assert.equal(barsPath(frames, 4), 'M0.08 1V0H0.92V1zM2.08 1V0.75H2.92V1zM3.08 1V0.98H3.92V1z')
  assert.equal(barsPath(frames.slice(0, 1), 100), 'M0 1V0H1V1z')
})

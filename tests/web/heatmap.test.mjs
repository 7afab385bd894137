import assert from 'node:assert/strict'
import { test } from 'node:test'

import {
  cividis, cividisGradient, decodeBytes, decodeGrid, hitTest, mayCover, moveCursor, paint, tokensOf
} from '../../web/heatmap.js'
import { base64 } from './fixtures.mjs'

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
  assert.equal(decodeBytes('%%%'), null)
})

test('pixels are opaque and take the fixed scale', () => {
  assert.deepEqual([...paint(Uint8Array.of(0, 255))], [...cividis(0), 255, ...cividis(1), 255])
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

test('the cells of a shrunken map share out all tokens, none missed and none twice', () => {
  for (const tokens of [64, 65, 90, 256]) {
    const covered = Array.from({ length: 64 }, (_, cell) => tokensOf(cell, 64, tokens))
    assert.deepEqual([covered[0][0], covered.at(-1)[1]], [0, tokens - 1])
    for (let i = 1; i < 64; i++) assert.equal(covered[i][0], covered[i - 1][1] + 1)
  }
})

test('a picture of another shape is not laid under the map', () => {
  const square = { token_rows: 16, token_cols: 16 }
  assert.equal(mayCover(square, 256, 256), true)
  assert.equal(mayCover(square, 2048, 2048), true)
  assert.equal(mayCover(square, 250, 256), true) // the last column of tokens reaches beyond the picture
  assert.equal(mayCover(square, 256, 200), false)
  assert.equal(mayCover(square, 200, 256), false)
  assert.equal(mayCover({ token_rows: 48, token_cols: 84 }, 1344, 768), true)
  assert.equal(mayCover({ token_rows: 48, token_cols: 84 }, 768, 1344), false)
  assert.equal(mayCover({ token_rows: 1, token_cols: 1 }, 8, 16), true)
})

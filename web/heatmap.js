// The arithmetic of the token map: colours, bytes, cells. No DOM, no ComfyUI: all of it runs under `node --test`.

// Every fifth entry of matplotlib's cividis (CC0), which reads the same with and without colour vision.
// Linear between them, it stays within 4/255 of the full table.
const CIVIDIS_HEX =
  '00224e002656002a5f002d68003070083370163770203a6f273e6e2e416d34456c3a486c3f4c6c' +
  '444f6c49536c4e566c535a6d575d6d5c616e60646f656870696b716d6f727272747676767a7a78' +
  '7e7d788381798885788d8878928c789690779b9476a09875a59c74aaa073afa471b5a86fbaac6d' +
  'bfb06bc4b468c9b965cfbd62d4c15fdac65bdfca57e5cf52ead34cf0d846f6dd3ffce236fee838'

const STOPS = CIVIDIS_HEX.match(/.{6}/g).map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)))

/** The colour of a share 0..1 as [red, green, blue]. The scale is fixed: a colour means the same in every run. */
export function cividis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1)
  const below = Math.min(Math.floor(place), STOPS.length - 2)
  const mix = place - below
  return STOPS[below].map((channel, i) => Math.round(channel + mix * (STOPS[below + 1][i] - channel)))
}

/** The same scale as a CSS gradient, for the legend. */
export function cividisGradient(stops = 9) {
  const colours = Array.from({ length: stops }, (_, i) => `rgb(${cividis(i / (stops - 1)).join(' ')})`)
  return `linear-gradient(90deg, ${colours.join(', ')})`
}

const PALETTE = Uint8ClampedArray.from(
  Array.from({ length: 256 }, (_, byte) => [...cividis(byte / 255), 255]).flat()
)

/** Base64 as bytes, or null where it is none. */
export function decodeBytes(base64) {
  try {
    return Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))
  } catch {
    return null
  }
}

/** A map as bytes, row by row (255: computed everywhere), or null when it does not fit its own size. */
export function decodeGrid({ grid, rows, cols }) {
  const bytes = decodeBytes(grid)
  return rows > 0 && cols > 0 && bytes?.length === rows * cols ? bytes : null
}

/** The map's bytes as RGBA pixels. */
export function paint(bytes) {
  const pixels = new Uint8ClampedArray(4 * bytes.length)
  bytes.forEach((byte, i) => pixels.set(PALETTE.subarray(4 * byte, 4 * byte + 4), 4 * i))
  return pixels
}

/** Which cell of a rows × cols map lies under a point, given the box the map fills; null outside. */
export function hitTest(x, y, box, rows, cols) {
  const col = Math.floor(((x - box.left) / box.width) * cols)
  const row = Math.floor(((y - box.top) / box.height) * rows)
  return row >= 0 && row < rows && col >= 0 && col < cols ? { row, col } : null
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }

/** Where a key moves the cursor on the map: the new cell, null for Escape, undefined for a key that is not ours. */
export function moveCursor(cursor, key, rows, cols) {
  if (key === 'Escape') return null
  const arrow = ARROWS[key]
  if (!arrow) return undefined
  if (!cursor) return { row: Math.floor((rows - 1) / 2), col: Math.floor((cols - 1) / 2) }
  const inside = (value, size) => Math.min(Math.max(value, 0), size - 1)
  return { row: inside(cursor.row + arrow[0], rows), col: inside(cursor.col + arrow[1], cols) }
}

/** The first and last token, counted from 0, that a cell stands for; the server cuts them the same way. */
export function tokensOf(cell, cells, tokens) {
  return [Math.floor((cell * tokens) / cells), Math.floor(((cell + 1) * tokens) / cells) - 1]
}

/** Whether a picture may be the whole of what the tokens cover: the last row and column may reach beyond its edge. */
export function mayCover({ token_rows, token_cols }, width, height) {
  const aspect = width / height
  return aspect > (token_cols - 1) / token_rows - 0.01 && aspect * (token_rows - 1) < token_cols + 0.01
}

// The map as one picture to share: maps with the picture under them, legend, and the numbers as text.

import { cividis } from './heatmap.js'
import { t } from './strings.js'
import { compareText, costText, whereText } from './words.js'

const PAD = 20
const MAP_WIDTH = 512
const LINE = 20
const LETTER = 24
const FONT = '14px Inter, system-ui, sans-serif'
const GROUND = '#1b1c1f'
const TEXT = '#f2f2f2'

/** Break a text into lines that fit; a single word that does not fit stands alone. */
export function wrap(text, width, measure) {
  const lines = ['']
  for (const word of text.split(' ')) {
    const longer = `${lines.at(-1)} ${word}`.trim()
    if (measure(longer) <= width || !lines.at(-1)) lines[lines.length - 1] = longer
    else lines.push(word)
  }
  return lines
}

/** The texts of a sheet: what is shown, and what it cost, of one run or of two. */
export function sheetTexts({ front, sides }, token) {
  const numbers = sides.length > 1 ? sides.map(compareText) : [costText(front.run, front.at)]
  return [t('sheet.title'), whereText(front.run, front.at), ...numbers, ...front.run.status.lines.slice(0, 1).map((said) => (front.letter ? `${front.letter}: ${said}` : said)), token]
    .filter(Boolean)
}

function drawMap(context, { canvas, image, hasPicture }, picture, x, y, width, height) {
  context.filter = `saturate(${picture})` // as view.css has it; a browser that knows no filter draws it in colour
  if (hasPicture) context.drawImage(image, x, y, width, height)
  context.filter = 'none'
  context.imageSmoothingEnabled = false
  context.globalAlpha = hasPicture ? 1 - picture : 1
  context.drawImage(canvas, x, y, width, height)
  context.globalAlpha = 1
  context.imageSmoothingEnabled = true
}

/** A or B on the map of a comparison. */
function drawLetter(context, letter, x, y) {
  if (!letter) return
  context.fillStyle = GROUND
  context.fillRect(x, y, LETTER, LETTER)
  context.fillStyle = TEXT
  context.fillText(letter, x + 7, y + 17)
}

function drawLegend(context, x, y, width) {
  const [low, high] = [t('legend.low'), `${t('legend.high')} ${t('legend.what')}`]
  const [left, right] = [low, high].map((text) => context.measureText(text).width + 8)
  const colours = context.createLinearGradient(x + left, 0, x + width - right, 0)
  for (let i = 0; i <= 16; i++) colours.addColorStop(i / 16, `rgb(${cividis(i / 16).join(' ')})`)
  context.fillStyle = colours
  context.fillRect(x + left, y - 10, width - left - right, 10)
  context.fillStyle = TEXT
  context.fillText(low, x, y)
  context.fillText(high, x + width - right + 8, y)
}

/** A canvas with the maps that `panes` show, side by side. `picture` is how far they have faded to the picture. */
export function drawSheet(document, scene, panes, picture, token) {
  const canvas = document.createElement('canvas')
  const context = canvas.getContext('2d')
  context.font = FONT
  const shown = panes.filter((pane) => pane.canvas.width)
  const height = Math.max(...shown.map((pane) => Math.round((MAP_WIDTH * pane.canvas.height) / pane.canvas.width)))
  const width = shown.length * (MAP_WIDTH + PAD) - PAD
  const lines = sheetTexts(scene, token).flatMap((text) => wrap(text, width, (part) => context.measureText(part).width))
  canvas.width = width + 2 * PAD
  canvas.height = height + (lines.length + 1) * LINE + 3 * PAD
  context.fillStyle = GROUND
  context.fillRect(0, 0, canvas.width, canvas.height)
  context.font = FONT
  shown.forEach((pane, i) => {
    const x = PAD + i * (MAP_WIDTH + PAD)
    drawMap(context, pane, picture, x, PAD, MAP_WIDTH, Math.round((MAP_WIDTH * pane.canvas.height) / pane.canvas.width))
    drawLetter(context, scene.panes[i].letter, x + 6, PAD + 6)
  })
  drawLegend(context, PAD, PAD + height + LINE, width)
  lines.forEach((line, i) => context.fillText(line, PAD, PAD + height + (i + 2) * LINE + 6))
  return canvas
}

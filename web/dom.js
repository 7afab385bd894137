// Small helpers for making elements. The document is handed in, so that views can be tested outside a browser.

const SVG = 'http://www.w3.org/2000/svg'
let groups = 0

/** The makers of HTML elements and of SVG ones, and of a switch. */
export function domOf(document) {
  const fill = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
    element.append(...children)
    return element
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children)
  const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children)
  return { make, draw, choice: (label, options, choose) => choice(make, label, options, choose) }
}

/** A row of radio buttons. `options` are [value, text, label]; `choose` is called with the value. */
function choice(make, label, options, choose) {
  const name = `dydit-choice-${groups++}`
  const inputs = options.map(([value, , title]) => make('input', { type: 'radio', name, value, 'aria-label': title }))
  inputs.forEach((input) => input.addEventListener('change', () => choose(input.value)))
  const root = make('div', { class: 'dydit-choice', role: 'radiogroup', 'aria-label': label }, ...inputs.map(
    (input, i) => make('label', { title: options[i][2] }, input, make('span', {}, options[i][1]))
  ))
  return { root, inputs, set: (value) => inputs.forEach((input) => { input.checked = input.value === value }) }
}

/** Keep a drag for this element: older Nodes 2.0 would move the node along. The middle button pans the graph. */
export function keepPointer(element) {
  for (const type of ['pointerdown', 'pointermove', 'pointerup'])
    element.addEventListener(type, (event) => { if (!(event.buttons & 4)) event.stopPropagation() })
}

/** Call `point` where the element is pressed, and wherever the pointer is dragged from there. */
export function trackPointer(element, point) {
  keepPointer(element)
  element.addEventListener('pointerdown', (event) => {
    if (event.button !== 0) return
    element.setPointerCapture(event.pointerId)
    point(event)
  })
  element.addEventListener('pointermove', (event) => { if (event.buttons & 1) point(event) })
}

/** Draw { width, height, pixels } on a canvas, a pixel for a cell; CSS stretches it. */
export function putPixels(canvas, { width, height, pixels }) {
  if (canvas.width !== width) canvas.width = width
  if (canvas.height !== height) canvas.height = height
  if (!width || !height) return
  const context = canvas.getContext('2d')
  const image = context.createImageData(width, height)
  image.data.set(pixels)
  context.putImageData(image, 0, 0)
}

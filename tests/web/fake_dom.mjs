// Just enough of a document for the views: elements that remember what was set on them.

class FakeElement {
  isConnected = true
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, children: [], dataset: {}, listeners: {}, hidden: false, own: '', value: '' })
    this.style = { setProperty(name, value) { this[name] = value } }
    this.classes = new Set()
    this.classList = { toggle: (name, on) => (on ? this.classes.add(name) : this.classes.delete(name)) }
    this.box = { left: 0, top: 0, width: 100, height: 100 }
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value)
    if (name === 'value') this.value = String(value)
  }
  set className(names) { this.attributes.class = names }
  append(...children) { this.children.push(...children) }
  prepend(child) { this.children.unshift(child) }
  replaceChildren(...children) { this.children = children; this.own = '' }
  get firstElementChild() { return this.children[0] ?? null }
  get textContent() { return this.own + this.children.map((child) => child.textContent ?? child).join('') }
  set textContent(text) { this.replaceChildren(); this.own = text }
  addEventListener(type, listener) { (this.listeners[type] ??= []).push(listener) }
  setPointerCapture() {}
  getBoundingClientRect() { return this.box }
  getContext() { return (this.context ??= new FakeContext(this)) }

  /** Send an event to this element, with the fields given; returns it. */
  fire(type, fields = {}) {
    const event = {
      type, button: 0, buttons: 0, stopped: false, prevented: false, ...fields,
      stopPropagation() { this.stopped = true }, preventDefault() { this.prevented = true }
    }
    for (const listener of this.listeners[type] ?? []) listener(event)
    return event
  }

  /** Every descendant with this class or tag, in order. */
  findAll(name) {
    return this.children.filter((child) => child instanceof FakeElement).flatMap((child) => {
      const is = child.tag === name || child.attributes.class?.split(' ').includes(name)
      return [...(is ? [child] : []), ...child.findAll(name)]
    })
  }
  find(name) { return this.findAll(name)[0] ?? null }
}

/** Remembers the texts and pictures that were drawn; a letter is 7 wide. */
class FakeContext {
  constructor(canvas) { Object.assign(this, { canvas, texts: [], images: [] }) }
  createImageData(width, height) { return { data: new Uint8ClampedArray(4 * width * height) } }
  putImageData(image) {
    this.canvas.pixels = [...image.data]
    this.canvas.draws = (this.canvas.draws ?? 0) + 1
  }
  measureText(text) { return { width: 7 * text.length } }
  createLinearGradient() { return { addColorStop() {} } }
  fillText(text) { this.texts.push(text.replaceAll('\u00a0', ' ')) }
  fillRect() {}
  drawImage(source, ...box) { this.images.push({ source, box, alpha: this.globalAlpha ?? 1 }) }
}

export const fakeDocument = {
  createElement: (tag) => new FakeElement(tag),
  createElementNS: (_, tag) => new FakeElement(tag)
}

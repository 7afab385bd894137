// Just enough of a document for view.js: elements that remember what was set on them.

class FakeElement {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, children: [], dataset: {}, listeners: {}, hidden: false, own: '' })
    this.style = { setProperty() {} }
    this.classes = new Set()
    this.classList = { toggle: (name, on) => (on ? this.classes.add(name) : this.classes.delete(name)) }
  }
  setAttribute(name, value) { this.attributes[name] = String(value) }
  append(...children) { this.children.push(...children) }
  prepend(child) { this.children.unshift(child) }
  replaceChildren(...children) { this.children = children; this.own = '' }
  get firstElementChild() { return this.children[0] ?? null }
  get textContent() { return this.own + this.children.map((child) => child.textContent ?? child).join('') }
  set textContent(text) { this.replaceChildren(); this.own = text }
  addEventListener(type, listener) { (this.listeners[type] ??= []).push(listener) }
  getBoundingClientRect() { return { left: 0, top: 0, width: 100, height: 100 } }
  getContext() {
    return {
      createImageData: (width, height) => ({ data: new Uint8ClampedArray(4 * width * height) }),
      putImageData: (image) => { this.pixels = [...image.data]; this.draws = (this.draws ?? 0) + 1 }
    }
  }

  /** Send an event to this element, with the fields given; returns it. */
  fire(type, fields = {}) {
    const event = {
      type, buttons: 0, stopped: false, prevented: false, ...fields,
      stopPropagation() { this.stopped = true }, preventDefault() { this.prevented = true }
    }
    for (const listener of this.listeners[type] ?? []) listener(event)
    return event
  }

  /** The first descendant with this class or, failing that, tag. */
  find(name) {
    for (const child of this.children.filter((child) => child instanceof FakeElement)) {
      if (child.tag === name || child.attributes.class?.split(' ').includes(name)) return child
      const found = child.find(name)
      if (found) return found
    }
    return null
  }
}

export const fakeDocument = {
  createElement: (tag) => new FakeElement(tag),
  createElementNS: (_, tag) => new FakeElement(tag)
}

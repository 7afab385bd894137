// A view with all it needs of a browser and a server.

import { Maps } from '../../web/maps.js'
import { NodeRecord } from '../../web/records.js'
import { MapView } from '../../web/view.js'
import { fakeDocument } from './fake_dom.mjs'
import { mapAnswer, plain, status, step } from './fixtures.mjs'

const settle = () => new Promise((resolve) => setImmediate(resolve))

/** A view, the record it shows, a server, and `paint()`, which is the browser's next animation frame. */
export function setUp({ remembered = {}, reply = () => mapAnswer() } = {}) {
  const asked = []
  const shared = []
  const drawing = []
  const slider = { budget: 0.6 }
  const memory = { get: (name, otherwise) => remembered[name] ?? otherwise, set: (name, value) => { remembered[name] = value } }
  const view = new MapView(fakeDocument, {
    memory, resized() {}, budget: () => slider.budget, onFrame: (draw) => drawing.push(draw),
    maps: new Maps(async (path) => { asked.push(path); return reply(path) }),
    share: async (canvas, file) => { shared.push([canvas.getContext().texts, canvas.getContext().images, file]); return 'copied' }
  })
  const record = new NodeRecord('w', '7')
  const paint = () => drawing.splice(0).forEach((draw) => draw())
  const show = () => { view.show(record); paint() }
  const arrive = async () => { await settle(); paint() }
  const part = (name) => view.root.find(name)
  const press = (element, key) => element.fire('keydown', { key })
  return { view, record, slider, remembered, asked, shared, drawing, paint, show, arrive, part, press, data: view.root.dataset }
}

/** The same after a run of four steps has ended, whose maps are on the server. */
export function afterRun({ run = {}, ...options } = {}) {
  const all = setUp(options)
  for (let i = 0; i < 4; i++) all.record.addStep(step(i, run))
  all.record.addStatus(status('a', 'done', { achieved: 0.5 }))
  all.show()
  return all
}

export const text = (element) => plain(element.textContent)
const option = (parts, value) => parts.findAll('input').find((input) => input.value === value)
export const choose = (parts, value) => Object.assign(option(parts, value), { checked: true }).fire('change')
export const button = (view, name) => view.root.findAll('button').find((element) => element.textContent === name)

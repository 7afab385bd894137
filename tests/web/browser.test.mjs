import assert from 'node:assert/strict'
import { test } from 'node:test'

import { pageMemory, sharePng } from '../../web/browser.js'

test('what is remembered comes back, in a name of its own', () => {
  const stored = new Map()
  const storage = { getItem: (key) => stored.get(key) ?? null, setItem: (key, value) => stored.set(key, value) }
  const memory = pageMemory(() => storage)
  assert.equal(memory.get('details', true), true)
  memory.set('details', false)
  assert.equal(memory.get('details', true), false)
  assert.deepEqual([...stored.keys()], ['dydit.token_map.details'])
})

test('a browser that keeps nothing, or kept nonsense, costs a preference only', () => {
  const forbidden = pageMemory(() => { throw new Error('denied') })
  forbidden.set('details', false)
  assert.equal(forbidden.get('details', true), true)
  assert.equal(pageMemory(() => ({ getItem: () => '{' })).get('details', true), true)
})

function page(write) {
  const saved = []
  const link = { click() { saved.push([this.href, this.download]) } }
  return {
    saved, written: [],
    navigator: write && { clipboard: { write } },
    ClipboardItem: class { constructor(items) { this.items = items } },
    document: { createElement: () => link },
    URL: { createObjectURL: (blob) => `blob:${blob}`, revokeObjectURL() {} },
    setTimeout: (later) => later()
  }
}
const canvas = { toBlob: (done) => done('png') }

test('a picture goes to the clipboard', async () => {
  const written = []
  const window = page(async ([item]) => written.push(await item.items['image/png']))
  assert.equal(await sharePng(window, canvas, 'map.png'), 'copied')
  assert.deepEqual([written, window.saved], [['png'], []])
})

test('where the clipboard refuses, or is not there, it is saved', async () => {
  for (const write of [() => Promise.reject(new Error('NotAllowed')), null]) {
    const window = page(write)
    assert.equal(await sharePng(window, canvas, 'map.png'), 'saved')
    assert.deepEqual(window.saved, [['blob:png', 'map.png']])
  }
})

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { mapPath, Maps } from '../../web/maps.js'
import { MEAN } from '../../web/selection.js'
import { mapAnswer } from './fixtures.mjs'

const settle = () => new Promise((resolve) => setImmediate(resolve))

/** Maps over a server that answers when told to; `asked` are the requests it got, `waits` the seconds it was waited for. */
function setUp() {
  const asked = []
  const waits = []
  const waiting = []
  const maps = new Maps(
    (path) => new Promise((resolve) => { asked.push(path); waiting.push(resolve) }),
    (seconds) => { waits.push(seconds); return Promise.resolve() }
  )
  const answer = async (reply = mapAnswer()) => { waiting.shift()(reply); await settle() }
  const view = () => ({ drawn: 0, refresh() { this.drawn++ } })
  return { maps, asked, waits, answer, view }
}

test('a map has one address, for the server and for the cache', () => {
  const at = { step: 3, block: MEAN, branch: null, frame: null }
  assert.equal(mapPath('w:7/1', at), '/dydit/trace/w%3A7%2F1/3/mean')
  assert.equal(mapPath('a', { ...at, block: 2, branch: 'cond', frame: 0 }), '/dydit/trace/a/3/2?branch=cond&frame=0')
})

test('scrubbing fast asks for the first and for where one stopped, one at a time', async () => {
  const { maps, asked, answer, view } = setUp()
  const one = view()
  for (let i = 0; i < 30; i++) maps.want(one, [`/${i}`])
  assert.deepEqual(asked, ['/0'])
  await answer()
  assert.deepEqual(asked, ['/0', '/29'])
  assert.equal(one.drawn, 0) // the first is not wanted any more
  await answer()
  assert.deepEqual([asked.length, one.drawn], [2, 1])
  assert.deepEqual([...maps.get('/29').bytes], [255, 255, 0, 0])
  assert.ok(maps.get('/0'))
})

test('what is here, or on its way, is not asked for again', async () => {
  const { maps, asked, answer, view } = setUp()
  const one = view()
  maps.want(one, ['/a'])
  maps.want(one, ['/a'])
  maps.want(view(), ['/a'])
  await answer()
  maps.want(one, ['/a'])
  await settle()
  assert.deepEqual(asked, ['/a'])
})

test('both maps of a comparison are fetched, and the view that looked last goes first', async () => {
  const { maps, asked, answer, view } = setUp()
  maps.want(view(), ['/busy'])
  maps.want(view(), ['/other'])
  maps.want(view(), ['/A', '/B'])
  for (let i = 0; i < 4; i++) await answer()
  assert.deepEqual(asked, ['/busy', '/A', '/B', '/other'])
})

test('a server that is busy is given the time it asks for, and then asked for the newest', async () => {
  const { maps, asked, waits, answer, view } = setUp()
  const one = view()
  maps.want(one, ['/1'])
  maps.want(one, ['/2'])
  await answer({ status: 429, retryAfter: 2, body: { error: 'too many' } })
  assert.deepEqual([waits, asked], [[2], ['/1', '/2']])
  await answer()
  assert.equal(one.drawn, 1)
})

test('an error is told once, and asked about again after one has looked elsewhere', async () => {
  const { maps, asked, answer, view } = setUp()
  const one = view()
  maps.want(one, ['/gone'])
  await answer({ status: 404, body: { error: 'no such run' } })
  assert.deepEqual([maps.error('/gone'), one.drawn, maps.get('/gone')], ['no such run', 1, null])
  maps.want(one, ['/gone'])
  assert.equal(asked.length, 1)
  maps.want(one, [])
  maps.want(one, ['/gone'])
  assert.equal(asked.length, 2)
})

test('a map that does not fit its size, and a server that is away, are errors in words', async () => {
  const { maps, answer, view } = setUp()
  maps.want(view(), ['/odd'])
  await answer(mapAnswer({ bytes: [1, 2, 3] }))
  assert.match(maps.error('/odd'), /could not be read/)
  const away = new Maps(() => Promise.reject(new Error('Failed to fetch')))
  away.want(view(), ['/x'])
  await settle()
  assert.equal(away.error('/x'), 'Failed to fetch')
})

test('the cache is bounded: the map that was not looked at for longest goes first', async () => {
  const asked = []
  const maps = new Maps(async (path) => { asked.push(path); return mapAnswer() })
  const one = { refresh() {} }
  const see = async (name) => { maps.want(one, [name]); await settle() }
  for (let i = 0; i < 400; i++) await see(`/${i}`)
  assert.ok(maps.get('/0'))
  await see('/400')
  assert.equal(maps.get('/1'), null)
  assert.ok(maps.get('/0') && maps.get('/400'))
})

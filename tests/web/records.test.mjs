import assert from 'node:assert/strict'
import { test } from 'node:test'

import { executionIds, findNode, NodeRecord, Records } from '../../web/records.js'
import { MEAN } from '../../web/selection.js'
import { status, step, summary } from './fixtures.mjs'

test('a running status starts a fresh run, and follows it', () => {
  const record = new NodeRecord('w', '7')
  record.addStatus(status('a', 'running'))
  record.addStep(step(0))
  record.selection = { step: 0, block: 1, branch: 'cond', frame: null }
  record.addStatus(status('b', 'running'))
  assert.deepEqual([record.run.id, record.run.count], ['b', 0])
  assert.deepEqual(record.selection, { step: null, block: 1, branch: 'cond', frame: null })
})

test('the first step of an unannounced run starts afresh too', () => {
  const record = new NodeRecord('w', '7')
  record.addStep(step(3, { run: 'a' }))
  record.addStep(step(1, { run: 'b' }))
  assert.deepEqual([record.run.id, record.run.count, record.run.latest, record.run.status.state], ['b', 1, 1, 'running'])
})

test('a status of no run, such as ready or refused, takes away the map of the last one', () => {
  for (const state of ['ready', 'refused']) {
    const record = new NodeRecord('w', '7')
    record.addStep(step(0))
    record.addStatus(status('', state))
    assert.deepEqual([record.run.count, record.run.id, record.run.status.state], [0, '', state])
  }
})

test('a summary that arrives after a newer run began is dropped', () => {
  const record = new NodeRecord('w', '7')
  record.addStatus(status('b', 'running'))
  record.addSummary(summary('a', 'done', [0]))
  assert.deepEqual([record.run.id, record.run.count, record.run.status.state], ['b', 0, 'running'])
  record.addSummary(summary('b', 'done', [0]))
  assert.equal(record.run.count, 1)
})

test('a pinned run stays as it is while the next one comes', () => {
  const record = new NodeRecord('w', '7')
  record.addStep(step(0))
  record.pinned = record.run
  assert.equal(record.compares, false)
  record.selection = { ...record.selection, step: MEAN }
  record.addStep(step(0, { run: 'b' }))
  assert.equal(record.compares, true)
  assert.deepEqual([record.pinned.id, record.pinned.count, record.run.id], ['a', 1, 'b'])
})

test('the records of a prompt are found, and none where none is running', () => {
  const records = new Records()
  records.of('w', '7').run.prompt = 'p'
  records.of('w', '8')
  assert.deepEqual(records.ofPrompt('p').map(({ node }) => node), ['7'])
  assert.deepEqual(records.ofPrompt(''), [])
})

test('records are per workflow and node, and the oldest unused one goes first', () => {
  const records = new Records()
  const first = records.of('w', '7')
  assert.notEqual(records.of('v', '7'), first)
  assert.notEqual(records.of('w', '12:7'), first)
  for (let i = 0; i < 15; i++) records.of('w', `n${i}`)
  assert.notEqual(records.of('w', '7'), first)
})

function nested() {
  const graph = (...nodes) => ({ nodes, getNodeById: (id) => nodes.find((node) => String(node.id) === String(id)) })
  const inner = { id: 5 }
  const shared = graph(inner, { id: 6, subgraph: graph({ id: 9 }) })
  return { root: graph({ id: 1 }, { id: 12, subgraph: shared }, { id: 14, subgraph: shared }), inner }
}

test('nodes are found by execution id, at any depth', () => {
  const { root, inner } = nested()
  assert.equal(findNode(root, '1').id, 1)
  assert.equal(findNode(root, '12:5'), inner)
  assert.equal(findNode(root, '12:6:9').id, 9)
  for (const id of ['5', '13:5', '1:5', '12:7']) assert.equal(findNode(root, id), null)
})

test('a node in a subgraph that is used twice has two execution ids', () => {
  const { root, inner } = nested()
  assert.deepEqual(executionIds(root, inner), ['12:5', '14:5'])
})

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { executionIds, findNode, Records, RunRecord } from '../../web/records.js'

const step = (run, step, total = 4) => ({ run, step, total })
const status = (run, state) => ({ run, state, lines: [state] })

test('a running status starts a fresh set of frames', () => {
  const record = new RunRecord('w', '7')
  record.addStatus(status('a', 'running'))
  record.addStep(step('a', 0))
  record.addStatus(status('b', 'running'))
  assert.equal(record.run, 'b')
  assert.equal(record.count, 0)
})

test('the first step of an unannounced run starts afresh too', () => {
  const record = new RunRecord('w', '7')
  record.addStep(step('a', 3))
  record.addStep(step('b', 1))
  assert.deepEqual([record.run, record.count, record.latest], ['b', 1, 1])
})

test('a status of no run, such as ready or refused, takes away the map of the last one', () => {
  for (const state of ['ready', 'refused']) {
    const record = new RunRecord('w', '7')
    record.addStep(step('a', 0))
    assert.equal(record.status.state, 'running')
    record.addStatus(status('', state))
    assert.deepEqual([record.count, record.run, record.status.state], [0, '', state])
  }
})

test('dropped steps are gaps, shown as the nearest earlier step, and filled by the trace', () => {
  const record = new RunRecord('w', '7')
  record.addStatus(status('a', 'running'))
  for (const i of [1, 3]) record.addStep(step('a', i, 5))
  assert.equal(record.hasGaps, true)
  assert.equal(record.frameAt(2).step, 1)
  assert.equal(record.frameAt(0).step, 1)
  assert.equal(record.frameAt(99).step, 3)
  record.addTrace({ ...status('a', 'done'), frames: [0, 1, 2, 3].map((i) => step('a', i, 5)) })
  assert.deepEqual([record.hasGaps, record.count, record.total], [false, 4, 4])
})

test('a run that was interrupted or failed keeps the number of steps it was meant to have', () => {
  for (const state of ['interrupted', 'failed']) {
    const record = new RunRecord('w', '7')
    record.addStep(step('a', 0, 20))
    assert.equal(record.ended, false)
    record.addTrace({ ...status('a', state), frames: [step('a', 0, 1)] })
    assert.deepEqual([record.ended, record.total], [true, 20])
  }
})

test('a trace that arrives after a newer run began is dropped', () => {
  const record = new RunRecord('w', '7')
  record.addStatus(status('b', 'running'))
  record.addTrace({ ...status('a', 'done'), frames: [step('a', 0)] })
  assert.deepEqual([record.run, record.count, record.status.state], ['b', 0, 'running'])
})

test('a trace passes over a run with no steps', () => {
  const record = new RunRecord('w', '7')
  record.addTrace({ ...status('a', 'done'), frames: [] })
  assert.equal(record.frameAt(0), null)
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

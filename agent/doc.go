// Package agent keeps the SVIDs of a node's workloads: it makes their keys, asks the CA for certificates with each
// workload's own token, renews them in time, and serves them over SDS.
//
// The pieces, each a file:
//
//   - trust: the bundle by which the CA is known, from a file at first and from the CA after.
//   - self: the agent's own SVID, which opens the CA's door and nothing else.
//   - workload: one socket, one token file, one SVID; a rotation.Subject.
//   - batch: renewals that fall together become one call.
//   - follow: what the CA orders over Sync (bundle, denials, renewals), and the acknowledgements of bundles.
//   - store, restore: what outlives a restart, and how it is taken up again.
//   - distribute: a bundle on its way to all sockets and readers, and when the node has it.
//   - roster, source: workloads that come and go, told by those that know of them.
//   - proxies: whose streams hold a bundle, and who has to come back, after a restart or an end that was not theirs, before
//     a newer one is acknowledged.
//   - readers: who takes bundles elsewhere than over SDS, and is waited for like a proxy.
//   - serve, listen, bound: the sockets of the workloads.
//   - admin, check, ops, metrics: what people and programs see.
//
// What is held is served until it ends, whatever becomes of the CA, the agent's own SVID or other workloads.
package agent

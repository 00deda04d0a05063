// Package ca holds the certificate authority: its keys, its chain, its bundle, and the one way in which it signs.
//
//   - [Trust] is the bundle of roots that relying parties hold, with its sequence; it moves by compare-and-swap.
//   - [Authority] is this replica's intermediate: a key that lives in memory alone, signed by an [Upstream], replaced
//     at half-life. Roots stay with the upstream.
//   - [Issuer] prepares a template from a grant, lints it, records the intent in the [Ledger], signs once and compares
//     what came back. Nothing leaves that was not recorded before the key was used.
//   - [Sequencer] is the Ledger that stands before a store: many wait, one writes, one commit a group.
//   - [Serving] is the CA's own SVID, issued by the same Issuer.
//   - [ParseCSR] reads what strangers send; the public key is all that is taken from it.
//
// Authority and Serving are rotation.Subjects: the same loop keeps them that keeps a workload's SVID.
package ca

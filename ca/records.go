package ca

import "time"

// StoredBundle is the trust bundle as the store holds it: SPIFFE JSON, and its sequence.
type StoredBundle struct {
	Sequence uint64
	JSON     []byte
}

// Denial says that an identity gets nothing.
type Denial struct {
	ID    string    `json:"id"`
	Why   string    `json:"why,omitempty"`
	Since time.Time `json:"since"`
	By    string    `json:"by"`
}

// RenewOrder says: renew what was issued before a moment, spread over a while. It is forgotten once every SVID that it names
// has ended.
type RenewOrder struct {
	ID           string        `json:"id,omitempty"` // empty: all
	IssuedBefore time.Time     `json:"issuedBefore"`
	Spread       time.Duration `json:"spread"`
	Until        time.Time     `json:"until"`
	// Given is when the spread began, where IssuedBefore is another moment; zero: then.
	Given time.Time `json:"given,omitzero"`
	// For is the mark of what ordered it, where that may do so again after a crash, and has to know its own; else empty.
	For string `json:"for,omitempty"`
}

// Elapsed is how much time has passed at now since the spread began.
func (r RenewOrder) Elapsed(now time.Time) time.Duration {
	given := r.Given
	if given.IsZero() {
		given = r.IssuedBefore
	}
	return max(0, now.Sub(given))
}

// AgentRecord is what the CA knows of one agent SVID's holder. There may be several instances of an agent ID for a
// while: an agent that was replaced overlaps with its successor.
type AgentRecord struct {
	ID      string `json:"id"`
	Cluster string `json:"cluster"`
	// Instances are the SVIDs that may still call, newest first.
	Instances []AgentInstance `json:"instances"`
	Version   string          `json:"version,omitempty"`
	LastSeen  time.Time       `json:"lastSeen"`
	// AckedSequence is the highest bundle sequence that it has acknowledged.
	AckedSequence uint64 `json:"ackedSequence"`
	// HoldsUntil is the end of the last SVID that was issued through it: until then it has something to renew.
	HoldsUntil time.Time `json:"holdsUntil"`
}

// AgentInstance binds one agent SVID to the node and the pod it was attested on.
type AgentInstance struct {
	Serial   string    `json:"serial"` // lower-case hex
	NotAfter time.Time `json:"notAfter"`
	NodeName string    `json:"nodeName"`
	NodeUID  string    `json:"nodeUID"`
	PodName  string    `json:"podName"`
	PodUID   string    `json:"podUID"`
	// Namespace, ServiceAccount and ServiceAccountUID are the agent's own.
	Namespace         string `json:"namespace"`
	ServiceAccount    string `json:"serviceAccount"`
	ServiceAccountUID string `json:"serviceAccountUID"`
}

// Mark names one state of what operators and rollouts decided: the trust bundle, the journal of roots, denials, and
// renewal orders. Agents keep the mark of the last state that they followed, as a witness: who shows one that the store
// does not know proves that the store is older than that.
type Mark struct {
	// Generation grows with each change of that state; 0: nothing was decided yet.
	Generation uint64
	// Tag is random: two stores that went on from one backup have different ones at the same generation.
	Tag [16]byte
	// Bundle is the sequence of the trust bundle in that state.
	Bundle uint64
}

// Loss says that the store is older than what agents have followed.
type Loss struct {
	// Mark is the furthest state that was shown: the highest generation, and the highest sequence of the bundle.
	Mark Mark `json:"mark"`
	// Agent is who showed it, a SPIFFE ID.
	Agent string    `json:"agent"`
	Since time.Time `json:"since"`
}

// History is what a store knows of its own past.
type History struct {
	// MarkKey authenticates marks while they are with agents: 32 bytes, made with the store, and the same in its backups.
	MarkKey []byte
	// Loss is what an operator has yet to accept; nil: nothing.
	Loss *Loss
	// Floor is the bundle's sequence at which a loss was accepted last. What agents said of sequences below it they may
	// have said of a bundle that is lost.
	Floor uint64
	// RestoredAt is when the store was put back from a backup last; zero: never. What was issued between the backup and
	// then is not in the ledger.
	RestoredAt time.Time
}

// AcceptedJump is how far sequences and generations go on behind what was seen of a lost past, when its loss is accepted:
// there may be agents that saw more of it and were not heard yet.
const AcceptedJump = 1000

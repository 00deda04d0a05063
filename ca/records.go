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

// RenewOrder says: renew what was issued before a moment. It is forgotten once every SVID that it names has ended.
type RenewOrder struct {
	ID           string        `json:"id,omitempty"` // empty: all
	IssuedBefore time.Time     `json:"issuedBefore"`
	Spread       time.Duration `json:"spread"`
	Until        time.Time     `json:"until"`
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

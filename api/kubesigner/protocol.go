package kubesigner

import (
	"encoding/pem"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// object is a request, of either kind.
type object interface {
	runtime.Object
	metav1.Object
}

// protocol is how one kind of request is read and answered.
type protocol struct {
	// plural names the resource, versions are those that are spoken, the best first; door is the audit line's.
	plural, door string
	versions     []string
	rights       []right
	// empty makes an object to read into.
	empty func() object
	// open reports whether a request waits for this signer's answer.
	open func(obj object) bool
	// owner says whose a request is: that of a pod has its UID in it.
	owner func(obj object) string
	// strip drops what open and owner do not look at.
	strip func(obj object)
	// ask reads what a request asks for. The request that it returns says whose it claims to be also with an error, a
	// *refusal.Error, which says what this door does not allow.
	ask func(obj object) (registration.Request, error)
	// grant and deny are the answers, each a change of the object, to be made one after the other.
	grant func(obj object, svid ca.SVID) []answer
	deny  func(obj object, no *refusal.Error) []answer
	// maxSkew is how far the clocks may be apart; zero: they do not matter.
	maxSkew time.Duration
}

// answer is a change of an object's status through a subresource.
type answer struct {
	subresource string
	status      map[string]any
}

// explained is what a person reads of a refusal where the request is: what it is, this very case, and what to do.
func explained(no *refusal.Error) string {
	text := no.Reason.What()
	if no.Detail != "" {
		text += " " + no.Detail + "."
	}
	return text + " " + no.Reason.Do()
}

// chainPEM is the leaf first, then the intermediates.
func chainPEM(svid ca.SVID) []byte {
	var out []byte
	for _, c := range svid.Chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

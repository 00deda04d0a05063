package client

import (
	"crypto/sha256"
	"slices"
	"testing"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// answerUnder is an answer with one SVID under the intermediates; sent are those that come with it.
func answerUnder(under []string, sent ...string) *meshcav1.IssueX509SVIDsResponse {
	svid := &meshcav1.X509SVID{Chain: [][]byte{[]byte("leaf")}}
	for _, der := range under {
		digest := sha256.Sum256([]byte(der))
		svid.Intermediates = append(svid.Intermediates, digest[:])
	}
	a := &meshcav1.IssueX509SVIDsResponse{Results: []*meshcav1.X509SVIDResult{
		{Result: &meshcav1.X509SVIDResult_Refusal{Refusal: &meshcav1.Refusal{Reason: "X"}}},
		{Result: &meshcav1.X509SVIDResult_Svid{Svid: svid}},
	}}
	for _, der := range sent {
		a.Intermediates = append(a.Intermediates, []byte(der))
	}
	return a
}

func chainOf(a *meshcav1.IssueX509SVIDsResponse) (chain []string) {
	for _, der := range a.GetResults()[1].GetSvid().GetChain() {
		chain = append(chain, string(der))
	}
	return chain
}

func TestChainsAreCompletedFromWhatIsHeld(t *testing.T) {
	var m intermediates
	for _, step := range []struct{ under, sent []string }{
		{[]string{"one", "above"}, []string{"one", "above"}},
		{[]string{"one", "above"}, nil},
		{[]string{"two"}, []string{"two"}},
		{[]string{"one"}, nil},
	} {
		a := answerUnder(step.under, step.sent...)
		if err := m.complete(a); err != nil {
			t.Fatal(err)
		}
		if want := append([]string{"leaf"}, step.under...); !slices.Equal(chainOf(a), want) {
			t.Errorf("chain %q, want %q", chainOf(a), want)
		}
	}
	if got := m.digests(); len(got) != 3 {
		t.Errorf("%d digests are named as held", len(got))
	}
}

// A CA that leaves out what nobody holds is found out, and the next call asks for everything.
func TestAMissingIntermediateIsNoChain(t *testing.T) {
	var m intermediates
	if err := m.complete(answerUnder([]string{"one"}, "one")); err != nil {
		t.Fatal(err)
	}
	if err := m.complete(answerUnder([]string{"two"})); refusal.Of(err) != refusal.Internal {
		t.Errorf("got %v", err)
	}
	if held := m.digests(); len(held) != 0 {
		t.Errorf("%d digests are named as held", len(held))
	}
}

func TestFewIntermediatesAreRemembered(t *testing.T) {
	var m intermediates
	for i := range 3 * maxIntermediates {
		if err := m.complete(answerUnder(nil, string(rune('a'+i)))); err != nil {
			t.Fatal(err)
		}
	}
	held := m.digests()
	newest := sha256.Sum256([]byte(string(rune('a' + 3*maxIntermediates - 1))))
	if len(held) != maxIntermediates || string(held[0]) != string(newest[:]) {
		t.Errorf("%d are held", len(held))
	}
}

package admin

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

func TestDenyAllow(t *testing.T) {
	f := start(t, "rules: []")
	const id = "spiffe://mesh.example/ns/shop/sa/cart"
	e := registration.LedgerEvidence{Namespace: "shop", ServiceAccount: "cart"}
	f.ledger.entries = []ca.LedgerEntry{
		entry(3, time.Minute, time.Hour, e), entry(2, time.Minute, 2*time.Hour, e),
		entry(1, time.Minute, 5*time.Hour, registration.LedgerEvidence{Namespace: "other", ServiceAccount: "x"}),
	}
	got, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: id, Why: " stolen laptop "})
	if err != nil {
		t.Fatal(err)
	}
	by := fmt.Sprintf("uid %d", os.Getuid())
	if d := got.GetDenial(); d.GetSpiffeId() != id || d.GetWhy() != "stolen laptop" || d.GetBy() != by || time.Since(d.GetSince().AsTime()) > time.Minute {
		t.Errorf("got %v", d)
	}
	if left := time.Until(got.GetLastNotAfter().AsTime()); got.GetLiveSvids() != 2 || left < 115*time.Minute || left > 2*time.Hour {
		t.Errorf("%d live until %s, want 2 for two hours", got.GetLiveSvids(), left)
	}
	if got.GetAgentsConnected() != 3 {
		t.Errorf("%d agents have the word, want all 3 that are connected", got.GetAgentsConnected())
	}
	list, err := f.CA.ListDenials(t.Context(), &meshcav1.ListDenialsRequest{})
	if err != nil || len(list.GetDenials()) != 1 || list.GetDenials()[0].GetSpiffeId() != id {
		t.Errorf("denials %v, %v", list, err)
	}
	for _, was := range []bool{true, false} {
		a, err := f.CA.AllowSVID(t.Context(), &meshcav1.AllowSVIDRequest{SpiffeId: id})
		if err != nil || a.GetWasDenied() != was {
			t.Errorf("allow: %v, %v; want %t", a, err, was)
		}
	}
	lines := f.audited()
	for _, want := range []string{
		"svid deny " + by + " [spiffeID=" + id + " why=stolen laptop outcome=done]",
		"svid allow " + by + " [spiffeID=" + id + " wasDenied=true outcome=done]",
	} {
		if !strings.Contains(lines, want) {
			t.Errorf("the audit log lacks %q:\n%s", want, lines)
		}
	}
	if len(f.store.denials) != 0 {
		t.Errorf("the store still has %v", f.store.denials)
	}
}

func TestOrdersRefuse(t *testing.T) {
	f := start(t, "rules: []")
	for name, r := range map[string]*meshcav1.DenySVIDRequest{
		"empty":         {Why: "x"},
		"no ID":         {SpiffeId: "https://mesh.example/a", Why: "x"},
		"other domain":  {SpiffeId: "spiffe://other.example/a", Why: "x"},
		"the domain":    {SpiffeId: "spiffe://mesh.example", Why: "x"},
		"dots":          {SpiffeId: "spiffe://mesh.example/a/../b", Why: "x"},
		"percent":       {SpiffeId: "spiffe://mesh.example/a%2fb", Why: "x"},
		"too long":      {SpiffeId: "spiffe://mesh.example/" + strings.Repeat("a", 2048), Why: "x"},
		"the CA":        {SpiffeId: "spiffe://mesh.example/meshca/server", Why: "x"},
		"no reason":     {SpiffeId: "spiffe://mesh.example/a", Why: "  "},
		"long reason":   {SpiffeId: "spiffe://mesh.example/a", Why: strings.Repeat("x", 201)},
		"two lines":     {SpiffeId: "spiffe://mesh.example/a", Why: "a\nb"},
		"escape in why": {SpiffeId: "spiffe://mesh.example/a", Why: "a\x1b[2J"},
	} {
		_, err := f.CA.DenySVID(t.Context(), r)
		if got := refusal.Of(err); got != refusal.RequestMalformed {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, spread := range []time.Duration{-1, MaxSpread + 1} {
		_, err := f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{Spread: durationpb.New(spread)})
		wantReason(t, err, refusal.RequestMalformed)
	}
	_, err := f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{SpiffeId: "spiffe://mesh.example"})
	wantReason(t, err, refusal.RequestMalformed)
	if lines := f.audited(); lines != "" || len(f.store.denials)+len(f.store.renew) != 0 {
		t.Errorf("something was ordered: %s %v %v", lines, f.store.denials, f.store.renew)
	}
}

// An order that failed has an audit line too, and is told with its cause.
func TestOrdersFail(t *testing.T) {
	f := start(t, "rules: []")
	f.store.broken = errors.New("disk full")
	_, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: "spiffe://mesh.example/a", Why: "x"})
	wantReason(t, err, refusal.StoreUnavailable)
	_, err = f.CA.AllowSVID(t.Context(), &meshcav1.AllowSVIDRequest{SpiffeId: "spiffe://mesh.example/a"})
	wantReason(t, err, refusal.StoreUnavailable)
	_, err = f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{})
	wantReason(t, err, refusal.StoreUnavailable)
	for _, verb := range []string{"svid deny", "svid allow", "svid renew"} {
		if lines := f.audited(); !strings.Contains(lines, verb) || strings.Count(lines, "outcome=STORE_UNAVAILABLE") != 3 {
			t.Errorf("audit lines:\n%s", lines)
		}
	}
	// It took effect, and then the ledger failed: the answer says both.
	f.store.broken, f.ledger.err = nil, errors.New("disk on fire")
	_, err = f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: "spiffe://mesh.example/a", Why: "x"})
	wantReason(t, err, refusal.StoreUnavailable)
	if err == nil || !strings.Contains(err.Error(), "is denied, but") || len(f.store.denials) != 1 {
		t.Errorf("%v, stored %v", err, f.store.denials)
	}
}

func TestRenew(t *testing.T) {
	f := start(t, "rules: []")
	got, err := f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{Spread: durationpb.New(10 * time.Minute)})
	if err != nil || got.GetAgentsConnected() != 3 || got.GetOrder().GetSpread().AsDuration() != 10*time.Minute || got.GetOrder().GetSpiffeId() != "" {
		t.Fatalf("got %v, %v", got, err)
	}
	stored := f.store.renew[0]
	if stored.Spread != 10*time.Minute || stored.Until.Sub(stored.IssuedBefore) != 6*time.Hour {
		t.Errorf("stored %+v", stored)
	}
	if !strings.Contains(f.audited(), "svid renew") {
		t.Errorf("audit lines:\n%s", f.audited())
	}
}

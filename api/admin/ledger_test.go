package admin

import (
	"fmt"
	"strings"
	"testing"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

func TestListSVIDs(t *testing.T) {
	f := start(t, "rules: []")
	shop := registration.LedgerEvidence{Namespace: "shop", ServiceAccount: "cart", Pod: "cart-1", Node: "n1", Cluster: "prod", Rule: "default", Method: "kubernetes/jwks"}
	pay := registration.LedgerEvidence{Namespace: "pay", ServiceAccount: "api", Pod: "api-1", Node: "n2"}
	f.ledger.entries = []ca.LedgerEntry{
		entry(9, time.Minute, 6*time.Hour, shop),
		entry(8, 2*time.Minute, time.Minute, shop), // a short life, ended
		entry(7, time.Hour, 6*time.Hour, pay),
		entry(6, 7*time.Hour, 6*time.Hour, pay), // ended
		entry(5, 8*time.Hour, 6*time.Hour, shop),
	}
	f.ledger.entries[2].Evidence = []byte("{") // damaged
	for name, c := range map[string]struct {
		r    *meshcav1.ListSVIDsRequest
		want string
	}{
		"live":            {&meshcav1.ListSVIDsRequest{}, "9 7"},
		"all":             {&meshcav1.ListSVIDsRequest{IncludeExpired: true}, "9 8 7 6 5"},
		"limit":           {&meshcav1.ListSVIDsRequest{IncludeExpired: true, Limit: 2}, "9 8"},
		"id":              {&meshcav1.ListSVIDsRequest{SpiffeId: "spiffe://mesh.example/ns/pay/sa/api", IncludeExpired: true}, "7 6"},
		"namespace":       {&meshcav1.ListSVIDsRequest{Namespace: "shop", IncludeExpired: true}, "9 8 5"},
		"service account": {&meshcav1.ListSVIDsRequest{ServiceAccount: "api", IncludeExpired: true}, "6"},
		"pod":             {&meshcav1.ListSVIDsRequest{Pod: "cart-1"}, "9"},
		"node":            {&meshcav1.ListSVIDsRequest{Node: "n2", IncludeExpired: true}, "6"},
		"serial":          {&meshcav1.ListSVIDsRequest{Serial: "AB:07"}, "7"},
		"none":            {&meshcav1.ListSVIDsRequest{Namespace: "nowhere"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, e := range f.list(t, c.r) {
				got = append(got, fmt.Sprint(e.GetIndex()))
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("got %v, want %s", got, c.want)
			}
		})
	}
	got := f.list(t, &meshcav1.ListSVIDsRequest{Limit: 1})[0]
	if got.GetSerial() != "ab09" || got.GetEvidence().GetPod() != "cart-1" || got.GetEvidence().GetRule() != "default" || got.GetAuthorityKeyId() != "01" || got.GetTbsDigest() != "02" {
		t.Errorf("got %v", got)
	}
	for _, r := range []*meshcav1.ListSVIDsRequest{{Limit: MaxEntries + 1}, {Serial: "xyz"}, {SpiffeId: "shop/cart"}, {SpiffeId: "spiffe://other.example/a"}} {
		stream, err := f.CA.ListSVIDs(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		wantReason(t, err, refusal.RequestMalformed)
	}
}

func TestListSVIDsMany(t *testing.T) {
	f := start(t, "rules: []")
	for i := range MaxEntries + 5 {
		f.ledger.entries = append(f.ledger.entries, entry(i, time.Minute, time.Hour, registration.LedgerEvidence{Namespace: "a", ServiceAccount: "b"}))
	}
	if n := len(f.list(t, &meshcav1.ListSVIDsRequest{})); n != DefaultEntries {
		t.Errorf("%d entries without a limit, want %d", n, DefaultEntries)
	}
	if n := len(f.list(t, &meshcav1.ListSVIDsRequest{Limit: MaxEntries})); n != MaxEntries {
		t.Errorf("%d entries, want %d", n, MaxEntries)
	}
}

package attestor_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"

	"github.com/meshca/meshca/attestor"
)

func TestNewIdentity(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, test := range []struct {
		cluster, namespace, account string
		ok                          bool
	}{
		{"prod", "shop", "web", true},
		{"p", "0", "a.b-c.d", true},
		{long, long, strings.Repeat("a.", 126) + "a", true},
		{"prod", "shop", strings.Repeat("a", 253), true}, // a subdomain's labels have no bound of their own

		{"", "shop", "web", false}, {"prod", "", "web", false}, {"prod", "shop", "", false},
		{"Prod", "shop", "web", false}, {"prod", "Shop", "web", false}, {"prod", "shop", "Web", false},
		{"pr.od", "shop", "web", false}, {"prod", "sh.op", "web", false},
		{long + "a", "shop", "web", false}, {"prod", long + "a", "web", false}, {"prod", "shop", strings.Repeat("a", 254), false},
		{"-prod", "shop", "web", false}, {"prod-", "shop", "web", false}, {"prod", "-shop", "web", false}, {"prod", "shop-", "web", false},
		{"prod", "shop", "-web", false}, {"prod", "shop", "web-", false}, {"prod", "shop", "a.-b", false}, {"prod", "shop", "a-.b", false},
		{"prod", "shop", ".web", false}, {"prod", "shop", "web.", false}, {"prod", "shop", "a..b", false}, {"prod", "shop", "..", false},
		{"prod", "shop", "a/b", false}, {"prod", "a/b", "web", false}, {"a/b", "shop", "web", false},
		{"prod", "shop", "web:admin", false}, {"prod", "shop:x", "web", false}, {"prod", "shop", "a%2fb", false},
		{"prod", "shop", "web\x00", false}, {"prod", "shop", "web\n", false}, {"prod", "shop", "wéb", false}, {"prod", "shop", "we b", false},
	} {
		id, err := attestor.NewIdentity(test.cluster, test.namespace, test.account)
		if (err == nil) != test.ok {
			t.Errorf("%q, %q, %q: got %v, want sound %v", test.cluster, test.namespace, test.account, err, test.ok)
		}
		if err != nil && !id.IsZero() {
			t.Errorf("%q, %q, %q: an identity came with the error: %v", test.cluster, test.namespace, test.account, id)
		}
		if err == nil && (id.Cluster() != test.cluster || id.Namespace() != test.namespace || id.ServiceAccount() != test.account || id.IsZero()) {
			t.Errorf("%q, %q, %q became %v", test.cluster, test.namespace, test.account, id)
		}
	}
}

func TestIdentitiesCompare(t *testing.T) {
	a, _ := attestor.NewIdentity("prod", "shop", "web")
	b, _ := attestor.NewIdentity("prod", "shop", "web")
	c, _ := attestor.NewIdentity("prod", "shop", "web2")
	if a != b || a == c || a.String() != "prod/shop/web" {
		t.Errorf("%v, %v, %v", a, b, c)
	}
	if !(attestor.Identity{}).IsZero() {
		t.Error("the zero identity is somebody")
	}
}

// FuzzNewIdentity holds what is accepted against Kubernetes' own expressions (k8s.io/apimachinery/pkg/util/validation).
func FuzzNewIdentity(f *testing.F) {
	const label = `[a-z0-9]([-a-z0-9]*[a-z0-9])?`
	isLabel := regexp.MustCompile(`^` + label + `\z`)
	isSubdomain := regexp.MustCompile(`^` + label + `(\.` + label + `)*\z`)
	f.Add("prod", "shop", "web")
	f.Add("a/b", "..", "web:admin")
	f.Add("p", "s", "a.b-c.0")
	f.Fuzz(func(t *testing.T, cluster, namespace, account string) {
		want := isLabel.MatchString(cluster) && len(cluster) <= 63 && isLabel.MatchString(namespace) && len(namespace) <= 63 &&
			isSubdomain.MatchString(account) && len(account) <= 253
		id, err := attestor.NewIdentity(cluster, namespace, account)
		if (err == nil) != want {
			t.Fatalf("%q, %q, %q: got %v, want sound %v", cluster, namespace, account, err, want)
		}
		if err == nil && id.String() != cluster+"/"+namespace+"/"+account {
			t.Fatalf("it became %s", id)
		}
	})
}

// A token comes out by Secret and by nothing else.
func TestTokenDoesNotPrint(t *testing.T) {
	const secret = "eyJhbGciOiJSUzI1NiJ9.e30.c2ln"
	token := attestor.NewToken(secret)
	holder := struct {
		Token   attestor.Token
		Pointer *attestor.Token
		Map     map[string]attestor.Token
	}{token, &token, map[string]attestor.Token{"a": token}}
	var log strings.Builder
	logger := slog.New(slog.NewJSONHandler(&log, nil))
	logger.Info("m", "token", token, "pointer", &token, "holder", holder)
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "token", token, "holder", holder)
	asJSON, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		fmt.Sprint(token), fmt.Sprintf("%s %v %+v %#v %q %x %d", token, token, token, token, token, token, token), fmt.Sprintf("%v %+v %#v", holder, holder, holder),
		fmt.Sprintf("%v %s", &token, &token), fmt.Errorf("e: %v", token).Error(), string(asJSON), log.String(),
	} {
		if strings.Contains(text, secret) || strings.Contains(text, fmt.Sprintf("%x", secret)) || strings.Contains(text, "eyJ") {
			t.Errorf("the secret shows: %s", text)
		}
	}
	if token.Secret() != secret {
		t.Error("the secret is gone")
	}
}

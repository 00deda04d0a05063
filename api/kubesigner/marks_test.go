package kubesigner

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Whatever the trust domain, what is published for it can be found by a label of its own.
func TestLabelsOfTrustDomains(t *testing.T) {
	seen := map[string]bool{}
	for domain, plain := range map[string]bool{
		"mesh.test": true, strings.Repeat("a", 63): true, strings.Repeat("a", 64): false, strings.Repeat("a", 255): false, "-mesh": false, "mesh_": false,
	} {
		value := labels(material{domain: domain})[domainLabel]
		if len(validation.IsValidLabelValue(value)) > 0 || (value == domain) != plain || seen[value] {
			t.Errorf("%s has the label %s", domain, value)
		}
		seen[value] = true
	}
}

// An object that was published without its label, or lost it, gets it, and readers are given no more time for that.
func TestALabelThatIsMissing(t *testing.T) {
	c := newCrier(t, 5)
	since := c.look().Since
	c.do(func() { delete(c.maps["default"]["metadata"].(map[string]any), "labels") })
	if now := c.look(); !now.Since.Equal(since) {
		t.Errorf("since %s, before %s", now.Since, since)
	}
	if got := c.maps["default"]["metadata"].(map[string]any)["labels"].(map[string]any)[domainLabel]; got != "mesh.test" {
		t.Errorf("it has the label %v", got)
	}
}

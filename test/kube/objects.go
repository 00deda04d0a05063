package kube

import (
	"context"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Admin is an administrator's way into a cluster.
type Admin struct {
	// Kubeconfig is the path of an administrator's kubeconfig.
	Kubeconfig string
	// Clientset is the administrator's client, without a rate limit.
	Clientset *kubernetes.Clientset
}

// NewAdmin reads a kubeconfig.
func NewAdmin(kubeconfig string) (Admin, error) {
	conf, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return Admin{}, err
	}
	conf.QPS = -1
	conf.Timeout = 30 * time.Second
	conf.WarningHandler = rest.NoWarnings{}
	clientset, err := kubernetes.NewForConfig(conf)
	return Admin{Kubeconfig: kubeconfig, Clientset: clientset}, err
}

// CreateNamespace creates a namespace.
func (a Admin) CreateNamespace(ctx context.Context, name string) (*corev1.Namespace, error) {
	return a.Clientset.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
}

// CreateServiceAccount creates a service account.
func (a Admin) CreateServiceAccount(ctx context.Context, namespace, name string) (*corev1.ServiceAccount, error) {
	return a.Clientset.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
}

// CreateNode creates a Node object; nothing runs on it.
func (a Admin) CreateNode(ctx context.Context, name string) (*corev1.Node, error) {
	return a.Clientset.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
}

// CreatePod creates a pod that is bound to a node by its name; an empty one leaves it unbound.
func (a Admin) CreatePod(ctx context.Context, namespace, name, serviceAccount, node string) (*corev1.Pod, error) {
	grace := int64(30)
	return a.Clientset.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			ServiceAccountName: serviceAccount, NodeName: node, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{Name: "c", Image: "localhost/nothing:1"}},
		},
	}, metav1.CreateOptions{})
}

// SetPodPhase sets a pod's phase, as its kubelet would.
func (a Admin) SetPodPhase(ctx context.Context, pod *corev1.Pod, phase corev1.PodPhase) error {
	p := pod.DeepCopy()
	p.ResourceVersion = ""
	p.Status.Phase = phase
	_, err := a.Clientset.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, p, metav1.UpdateOptions{})
	return err
}

// DeletePod deletes a pod; with a grace of zero it is gone at once.
func (a Admin) DeletePod(ctx context.Context, pod *corev1.Pod, grace time.Duration) error {
	seconds := int64(grace / time.Second)
	return a.Clientset.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &seconds})
}

// Token asks the API server for a service account's token, as a kubelet does for a pod; a nil pod leaves it unbound. The
// API server issues none for less than ten minutes.
func (a Admin) Token(ctx context.Context, namespace, serviceAccount string, pod *corev1.Pod, audience string, ttl time.Duration) (string, error) {
	seconds := int64(ttl / time.Second)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}
	if audience != "" {
		request.Spec.Audiences = []string{audience}
	}
	if pod != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	answer, err := a.Clientset.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, serviceAccount, request, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return answer.Status.Token, nil
}

// Allow gives a user these rights in the whole cluster.
func (a Admin) Allow(ctx context.Context, user string, rules ...rbacv1.PolicyRule) error {
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: user}, Rules: rules}
	if _, err := a.Clientset.RbacV1().ClusterRoles().Create(ctx, role, metav1.CreateOptions{}); err != nil {
		return err
	}
	_, err := a.Clientset.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
	}, metav1.CreateOptions{})
	return err
}
